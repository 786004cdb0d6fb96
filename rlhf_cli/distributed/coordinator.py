"""Rank 0 plans, locks and publishes; it broadcasts which stage starts next to the other processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_cli.distributed.process_group import LISTENER, ProcessGroup


@dataclass(frozen=True)
class StageStart:
    """What rank 0 broadcasts before it starts a stage.

    Attributes:
        stage: name of the stage.
        inputs: its inputs, as JSON holds them; see `StageContext`.
    """

    stage: str
    inputs: Mapping[str, Any]


class Coordinator:
    """Keeps the processes of a run in the same stage. A single process sends nothing and imports nothing.

    Args:
        check: is called once in every process, with all of them, before the first stage starts.
    """

    def __init__(self, check: Callable[[ProcessGroup], None]) -> None:
        self._processes = ProcessGroup()
        self._check = check
        self._has_begun = False

    def begin(self) -> None:
        """Check once that the processes can work together, if there are several; every process must call it."""
        if not self._has_begun and self._processes.count > 1:
            self._check(self._processes)
        self._has_begun = True

    def broadcast(self, start: StageStart | None) -> None:
        """Rank 0: start this stage in all processes; None ends the run."""
        if start is None and not self._has_begun and LISTENER in os.environ:
            return  # every stage is up to date, so torch is not even imported: the supervisor ends the other processes
        self.begin()
        self._processes.all_gather_object(None if start is None else asdict(start))

    def receive(self) -> StageStart | None:
        """All other ranks: wait for the next stage; None at the end of the run."""
        self.begin()
        message: dict[str, Any] | None = self._processes.all_gather_object(None)[0]
        return None if message is None else StageStart(**message)

    def barrier(self) -> None:
        """Wait until all processes have finished the stage, so that it can be published."""
        self._processes.barrier()
