"""Ranked groups as a reward model reads them, and which of them make up an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_cli.data.records import Ranking
from rlhf_cli.models.reward_model.batch import Encoded
from rlhf_cli.models.reward_model.model import RewardModel


@dataclass(frozen=True)
class RankedGroup:
    """The K answers to one prompt; they stay together, so that all their pairs are in one batch element.

    Attributes:
        sequences: K encoded prompts with answers.
        levels: (K,) tier of each, 0 the best.
        margin: how much better the first tier is; 0 where nobody said.
    """

    sequences: tuple[Encoded, ...]
    levels: tuple[int, ...]
    margin: float

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sequence.ids) for sequence in self.sequences)


def encode_group(scorer: RewardModel, ranking: Ranking) -> RankedGroup:
    """A ranking in the scorer's ids; every answer gets the end token, as every answer gets it when scored."""
    sequences = tuple(scorer.encode(ranking.prompt, completion) for completion in ranking.completions)
    return RankedGroup(sequences, tuple(ranking.levels()), ranking.margin or 0.0)


class Batches:
    """Groups of every optimizer step, a function of the seed and the step alone.

    Args:
        count: groups.
        batch_size: groups in a step; the last of an epoch may be smaller.
        epochs: passes, not necessarily whole.
        seed: of the order, which is new in every epoch.
    """

    def __init__(self, count: int, batch_size: int, epochs: float, seed: int) -> None:
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._steps_per_epoch = -(-count // batch_size)
        self.steps = max(1, round(epochs * self._steps_per_epoch))

    def groups(self, step: int) -> list[int]:
        """Numbers of the groups of a step, 0-based."""
        epoch, place = divmod(step, self._steps_per_epoch)
        order = torch.randperm(self._count, generator=torch.Generator().manual_seed(self._seed + 7_919 * (epoch + 1)))
        return order[place * self._batch_size : (place + 1) * self._batch_size].tolist()


def micro_batches(groups: Sequence[RankedGroup], chosen: Sequence[int], size: int) -> list[list[int]]:
    """Whole groups, at most `size` at a time, those of like length together: padded rows waste least so."""
    ordered = sorted(chosen, key=lambda number: groups[number].longest)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
