"""What a training loop needs to work the same in one process and in several: one mind about stopping, one log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.errors import Interrupted
from rlhf_cli.training.checkpoint.store import restore_rng
from rlhf_cli.training.monitoring.metrics_log import MetricsLog
from rlhf_cli.training.random_state import SEED_STRIDE


class DistributedStop:
    """A request to stop that reached any process, known to all.

    A signal is seen by processes at different moments. One that left alone would leave the others waiting for it, and
    one that saved alone would save a step that the others did not do.

    Args:
        own: this process's own request.
        processes: those of the run.
    """

    def __init__(self, own: StopRequest, processes: ProcessGroup) -> None:
        self._own, self._processes = own, processes
        self._signum: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal came to any process; all of them ask at the same place of their loops."""
        if self._processes.count == 1:
            return self._own.requested
        told = self._processes.all_gather_object(_signal_of(self._own))
        self._signum = next((signum for signum in told if signum is not None), None)
        return self._signum is not None

    def check(self) -> None:
        """Raise `Interrupted` if `requested` was true when all asked; alone, if a signal came."""
        if self._processes.count == 1:
            self._own.check()
        elif self._signum is not None:
            raise Interrupted(self._signum)


def _signal_of(stop: StopRequest) -> int | None:
    try:
        stop.check()
    except Interrupted as interrupted:
        return interrupted.signum
    return None


def all_reduce_gradients(weights: Iterable[Tensor], processes: ProcessGroup) -> None:
    """Give every process the sum of all processes' gradients; one that no process has stays None, for the optimizer.

    Args:
        weights: trained ones, in the same order everywhere. A process whose share of a step was empty has no gradients.
        processes: those of the run.
    """
    if processes.count == 1:
        return
    known = list(weights)
    had = torch.tensor([weight.grad is not None for weight in known], dtype=torch.int32)
    processes.all_reduce([had])
    shared = [weight for weight, count in zip(known, had.tolist(), strict=True) if count]
    for weight in shared:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    processes.all_reduce([weight.grad for weight in shared if weight.grad is not None])


def restore_generators(tensors: dict[str, Tensor], processes: ProcessGroup, seed: int) -> None:
    """Put torch's generators back to where a checkpoint left them; a process that the run did not have is seeded.

    Args:
        tensors: with those of `rng_tensors`.
        processes: those of the run now, perhaps more than those that wrote the checkpoint.
        seed: of the run.
    """
    if f"rng/{processes.index}/cpu" in tensors:
        restore_rng(tensors, processes)
    else:
        torch.manual_seed(seed + SEED_STRIDE * processes.index)


class Log(Protocol):
    """Where a training loop writes its metrics."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step."""
        ...

    def sync(self) -> None:
        """Make what was written durable."""
        ...

    def close(self) -> None:
        """Make what was written durable, and close."""
        ...


class _NoLog:
    """The log of a process that does not write: rank 0 writes what all have computed together."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def metrics_log(path: Path, processes: ProcessGroup, *, after_step: int, make: Callable[..., Log] = MetricsLog) -> Log:
    """The log at `path` in rank 0, see `MetricsLog`; one that writes nothing in the others."""
    return make(path, after_step=after_step) if processes.is_main else _NoLog()
