"""Ranked groups as a reward model reads them, and which of them make up an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_cli.data.records import Ranking, split_key
from rlhf_cli.models.reward_model.batch import Encoded
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.training.shuffle import EndlessShuffle


@dataclass(frozen=True, slots=True)
class RankedGroup:
    """The K completions of one prompt; they stay together, so that all their pairs are in one batch element.

    Attributes:
        sequences: K encoded prompts with completions.
        levels: (K,) tier of each, 0 is the best.
        margin: how much better the first tier is; 0 where the annotator did not say.
    """

    sequences: tuple[Encoded, ...]
    levels: tuple[int, ...]
    margin: float

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sequence) for sequence in self.sequences)


def encode_group(model: RewardModel, ranking: Ranking) -> RankedGroup:
    """Encode a ranking; every completion is one that ended, as it is when it is scored."""
    sequences = tuple(model.encode(ranking.prompt, completion) for completion in ranking.completions)
    return RankedGroup(sequences, tuple(ranking.levels()), ranking.margin or 0.0)


def halves(rankings: Sequence[Ranking]) -> tuple[list[Ranking], list[Ranking]]:
    """Divide rankings by their questions, in the order of the hashes: every second one is in the second half."""
    keys = sorted({split_key(ranking.prompt) for ranking in rankings})
    second = frozenset(keys[1::2])
    return (
        [ranking for ranking in rankings if split_key(ranking.prompt) not in second],
        [ranking for ranking in rankings if split_key(ranking.prompt) in second],
    )


class Batches:
    """The groups of every optimizer step, as a function of the seed and the step.

    Args:
        count: number of groups.
        batch_size: groups per step; the last step of an epoch may have fewer.
        epochs: passes over the groups, not necessarily a whole number.
        seed: of the order, which is new in every epoch.
    """

    def __init__(self, count: int, batch_size: int, epochs: float, seed: int) -> None:
        self._count, self._batch_size = count, batch_size
        self._order = EndlessShuffle(count, seed=seed, name="rankings")
        self._steps_per_epoch = -(-count // batch_size)
        self.steps = max(1, round(epochs * self._steps_per_epoch))

    def groups(self, step: int) -> list[int]:
        """Return the numbers of the groups of the 0-based step."""
        epoch, number = divmod(step, self._steps_per_epoch)
        start, stop = number * self._batch_size, min((number + 1) * self._batch_size, self._count)
        return self._order.slice(epoch * self._count + start, epoch * self._count + stop)


def by_length(groups: Sequence[RankedGroup], chosen: Sequence[int]) -> list[int]:
    """Order the chosen groups by length, so that little of a micro-batch is padding."""
    return sorted(chosen, key=lambda number: groups[number].longest)


def padded_tokens(groups: Sequence[RankedGroup]) -> int:
    """Count the tokens of a pass over some groups, padding included."""
    return sum(len(group.sequences) for group in groups) * max(group.longest for group in groups)
