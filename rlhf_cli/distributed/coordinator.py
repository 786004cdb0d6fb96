"""Several processes, one pipeline: rank 0 plans, locks and publishes, and tells the others which stage comes next."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.rendezvous import LISTENER


@dataclass(frozen=True)
class Order:
    """What the other processes need to know of a stage that is about to run.

    Attributes:
        stage: its name.
        inputs: see `StageContext`.
    """

    stage: str
    inputs: Mapping[str, str]


class Coordinator:
    """The processes of this run. Alone, it says nothing and imports nothing."""

    def __init__(self) -> None:
        self._processes = ProcessGroup()
        self._has_met = False

    def lead(self, order: Order | None) -> None:
        """Rank 0: all begin this stage; None: there is no other."""
        if order is None and not self._has_met and LISTENER in os.environ:
            return  # nothing was to be done, so torch is not even imported: our supervisor ends those who wait
        self._has_met = True
        self._processes.all_gather_object(
            None if order is None else {"stage": order.stage, "inputs": dict(order.inputs)}
        )

    def follow(self) -> Order | None:
        """The others: wait for the next stage; None where there is none."""
        told: dict[str, Any] | None = self._processes.all_gather_object(None)[0]
        return None if told is None else Order(told["stage"], told["inputs"])

    def wait(self) -> None:
        """All have come to the end of a stage, so it is whole and may be published."""
        self._processes.barrier()
