"""Work that one process does for all, or each for itself, and whose errors end all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from rlhf_cli.errors import DiskError, DivergedError, HostMemoryError, ModelError, RLHFError

if TYPE_CHECKING:
    from rlhf_cli.distributed.process_group import ProcessGroup

T = TypeVar("T")
_KINDS = (DiskError, DivergedError, HostMemoryError, ModelError)


def agreed(work: Callable[[], T], processes: ProcessGroup | None) -> T:
    """Work in each process and wait for the others; the error of the first one that fails is raised in all of them.

    So none waits for one that has ended. Other errors than those of disk, divergence, host memory and models are raised
    at once, in this process alone.

    Args:
        work: what this process does, possibly nothing.
        processes: the processes of the run or of a group, all of which call this; None is this one alone.

    Returns:
        What this process's own work returned.
    """
    failure: RLHFError | None = None
    found: list[T] = []
    try:
        found.append(work())
    except _KINDS as error:
        failure = error
    if processes is not None:
        own = None if failure is None else [_kind(failure), failure.message, failure.hint]
        told = next((one for one in processes.all_gather_object(own) if one is not None), None)
        if told is not None and failure is None:
            failure = _KINDS[told[0]](told[1], hint=told[2])
    if failure is not None:
        raise failure
    return found[0]


def _kind(error: Exception) -> int:
    return next(number for number, kind in enumerate(_KINDS) if isinstance(error, kind))


def by_main(work: Callable[[], None], processes: ProcessGroup) -> None:
    """Let process 0 work while the others wait; see `agreed`."""
    agreed(work if processes.is_main else _nothing, processes)


def _nothing() -> None:
    """Do nothing."""
