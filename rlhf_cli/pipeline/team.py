"""Several processes, one pipeline: rank 0 plans, locks and publishes, and tells the others which stage comes next."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlhf_cli.processes import Processes, world_size
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.rendezvous import LISTENER


@dataclass(frozen=True)
class Order:
    """What the other processes need to know of a stage that is about to run.

    Attributes:
        stage: its name.
        inputs: see `StageContext`.
    """

    stage: str
    inputs: Mapping[str, str]


class Team:
    """The processes of this run. Alone, it says nothing and imports nothing.

    Args:
        recipe: says on which device they compute, and with it how they speak to one another.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._device = recipe.model.device

    @property
    def _has_met(self) -> bool:
        return "_processes" in self.__dict__

    @cached_property
    def _processes(self) -> Processes:
        if world_size() == 1:
            return Processes()
        from rlhf_cli.models.loading import resolve_device

        return Processes(resolve_device(self._device))

    def lead(self, order: Order | None) -> None:
        """Rank 0: all begin this stage; None: there is no other."""
        if order is None and not self._has_met and LISTENER in os.environ:
            return  # nothing was to be done, so torch is not even imported: our supervisor ends those who wait
        self._processes.collect(None if order is None else {"stage": order.stage, "inputs": dict(order.inputs)})

    def follow(self) -> Order | None:
        """The others: wait for the next stage; None where there is none."""
        told: dict[str, Any] | None = self._processes.collect(None)[0]
        return None if told is None else Order(told["stage"], told["inputs"])

    def wait(self) -> None:
        """All have come to the end of a stage, so it is whole and may be published."""
        self._processes.wait()
