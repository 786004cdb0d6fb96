"""One process's share of the micro-batches of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil

from rlhf_cli.stages.sft.data import BatchPlan


@dataclass(frozen=True)
class SharedPlan:
    """One process's share of a plan: every `count`-th micro-batch of each step, and empty ones where others have more.

    All processes do the same number of passes in a step, as a training loop of many processes expects.

    Attributes:
        plan: of all.
        index: of this process.
        count: of processes.
    """

    plan: BatchPlan
    index: int
    count: int

    @property
    def micro_batches_per_step(self) -> int:
        """Passes of a full step in each process."""
        return ceil(self.plan.micro_batches_per_step / self.count)

    def __len__(self) -> int:
        full, last = divmod(len(self.plan), self.plan.micro_batches_per_step)
        return full * self.micro_batches_per_step + ceil(last / self.count)

    def __iter__(self) -> Iterator[list[int]]:
        micro_batches = iter(self.plan)
        while step := list(islice(micro_batches, self.plan.micro_batches_per_step)):
            mine = step[self.index :: self.count]
            yield from mine
            yield from [[]] * (ceil(len(step) / self.count) - len(mine))
