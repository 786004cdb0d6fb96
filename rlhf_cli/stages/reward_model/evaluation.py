"""Agreement of rewards with held-out rankings, compared with judges that look at length only."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.data.records import Ranking, prompt_key
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.progress import task
from rlhf_cli.rewards.estimates import Measured, measured_share
from rlhf_cli.stages.reward_model.calibration import (
    BINS,
    Calibration,
    calibration,
    confidence,
    confidence_bin,
    is_right,
)
from rlhf_cli.stages.reward_model.stage import RewardModelContext

_MOST_VALUES = 6
"""A margin with at most this many values has one bin for each; one with more has `_PARTS`."""
_PARTS = 4


@dataclass(frozen=True)
class Pair:
    """Two completions of one ranking, one of which was preferred.

    Attributes:
        prompt: key of the prompt.
        distance: tiers between them, at least 1.
        difference: reward of the preferred completion minus that of the other.
        longer: characters of the preferred completion minus those of the other.
        margin: how much better the annotator called it; None if not said, and in pairs that no first tier wins.
    """

    prompt: str
    distance: int
    difference: float
    longer: int
    margin: float | None = None


@dataclass(frozen=True)
class Bin:
    """Pairs with similar values of some quantity.

    Attributes:
        low: lower end of the bin.
        high: upper end.
        mean: mean of the quantity over its pairs.
        accuracy: of its pairs.
    """

    low: float
    high: float
    mean: float
    accuracy: Measured

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {"low": self.low, "high": self.high, "mean": self.mean, "accuracy": self.accuracy.to_json()}


@dataclass(frozen=True)
class RankingReport:
    """Agreement of rewards with rankings, over all pairs except ties. Lengths are in characters.

    Attributes:
        accuracy: share of pairs whose preferred completion has the higher reward; equal rewards count 1/2.
        longer_chosen: accuracy on the pairs whose preferred completion is the longer one; None without such pairs.
        shorter_chosen: the same where it is the shorter one.
        always_longer: accuracy of always preferring the longer completion, on the same pairs.
        calibration: of sigmoid(difference).
        by_distance: one bin per number of tiers between the two.
        by_label_margin: bins of the annotator's margin; empty if the data has none.
        by_predicted_margin: bins of |difference|: whether larger differences are more often right.
        reliability: bins of confidence, of equal width.
        mean_best: mean reward of completions in the first tier.
        mean_worst: mean reward of completions in the last tier.
        ties: pairs that were skipped as ties.
        lowest: smallest reward of a completion.
        highest: largest one.
    """

    accuracy: Measured
    longer_chosen: Measured | None
    shorter_chosen: Measured | None
    always_longer: Measured
    calibration: Calibration
    by_distance: list[Bin]
    by_label_margin: list[Bin]
    by_predicted_margin: list[Bin]
    reliability: list[Bin]
    mean_best: float
    mean_worst: float
    ties: int
    lowest: float = math.nan
    highest: float = math.nan

    def measured(self) -> dict[str, Measured]:
        """Return the figures of all pairs by the name of their metric, those without pairs omitted."""
        found = {
            "accuracy": self.accuracy,
            "accuracy_longer_chosen": self.longer_chosen,
            "accuracy_shorter_chosen": self.shorter_chosen,
            "always_longer": self.always_longer,
            "calibration_error": self.calibration.error,
        }
        return {name: one for name, one in found.items() if one is not None}

    def to_json(self) -> dict[str, Any]:
        """Return the content of `quality.json` about the pairs."""
        return {
            "prompts": self.accuracy.prompts,
            "pairs": self.accuracy.count,
            "ties": self.ties,
            "metrics": {name: one.to_json() for name, one in self.measured().items()},
            "calibration_error_if_calibrated": self.calibration.if_calibrated,
            "by_distance": [one.to_json() for one in self.by_distance],
            "by_label_margin": [one.to_json() for one in self.by_label_margin],
            "by_predicted_margin": [one.to_json() for one in self.by_predicted_margin],
            "reliability": [one.to_json() for one in self.reliability],
        }


def check_has_preference(rankings: Sequence[Ranking]) -> None:
    """Check that a pair of the held-out rankings is not a tie.

    Raises:
        DataError: every pair is a tie.
    """
    if all(len(ranking.tiers) < 2 for ranking in rankings):
        raise DataError(
            f"the {len(rankings):,} held-out rankings have no preference: every pair is a tie",
            hint="hold out more prompts with `--set data.holdout=...`, or label with a smaller `tie_margin`",
        )


def ranking_report(rankings: Sequence[Ranking], rewards: Sequence[Sequence[float]]) -> RankingReport:
    """Compare raw rewards with rankings.

    Args:
        rankings: held-out rankings.
        rewards: per ranking one reward per completion, in the scale of the ranking loss.

    Raises:
        DataError: every pair is a tie.
    """
    check_has_preference(rankings)
    pairs, ties = preferred_pairs(rankings, rewards)
    ends = [_first_and_last(ranking, given) for ranking, given in zip(rankings, rewards, strict=True)]
    return RankingReport(
        accuracy=_present(_accuracy(pairs)),
        longer_chosen=_accuracy(pair for pair in pairs if pair.longer > 0),
        shorter_chosen=_accuracy(pair for pair in pairs if pair.longer < 0),
        always_longer=_present(measured_share((pair.prompt, is_right(pair.longer), 1.0) for pair in pairs)),
        calibration=calibration([pair.prompt for pair in pairs], [pair.difference for pair in pairs]),
        by_distance=_bins(pairs, lambda pair: float(pair.distance), most_values=len(pairs)),
        by_label_margin=_bins([pair for pair in pairs if pair.margin is not None], lambda pair: pair.margin or 0.0),
        by_predicted_margin=_bins(pairs, lambda pair: abs(pair.difference), most_values=1),
        reliability=_reliability(pairs),
        mean_best=_mean([reward for best, _ in ends for reward in best]),
        mean_worst=_mean([reward for _, worst in ends for reward in worst]),
        ties=ties,
        lowest=min(map(min, rewards)),
        highest=max(map(max, rewards)),
    )


def _accuracy(pairs: Iterable[Pair]) -> Measured | None:
    return measured_share((pair.prompt, is_right(pair.difference), 1.0) for pair in pairs)


def _present(one: Measured | None) -> Measured:
    assert one is not None
    return one


def _bins(pairs: Sequence[Pair], quantity: Callable[[Pair], float], *, most_values: int = _MOST_VALUES) -> list[Bin]:
    """One bin per value if there are at most `most_values`, else `_PARTS` with about as many pairs each."""
    values = sorted(map(quantity, pairs))
    starts = sorted(set(values))
    if len(starts) > most_values:
        starts = sorted({values[len(values) * part // _PARTS] for part in range(_PARTS)})
    members: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        members[bisect_right(starts, quantity(pair))].append(pair)
    return [_bin(own, list(map(quantity, own))) for _, own in sorted(members.items())]


def _bin(pairs: Sequence[Pair], values: Sequence[float]) -> Bin:
    return Bin(min(values), max(values), _mean(values), _present(_accuracy(pairs)))


def _reliability(pairs: Sequence[Pair]) -> list[Bin]:
    members: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        members[confidence_bin(pair.difference)].append(pair)
    return [
        Bin(
            0.5 + number / (2 * BINS),
            0.5 + (number + 1) / (2 * BINS),
            _mean([confidence(pair.difference) for pair in own]),
            _present(_accuracy(own)),
        )
        for number, own in sorted(members.items())
    ]


def preferred_pairs(rankings: Sequence[Ranking], rewards: Sequence[Sequence[float]]) -> tuple[list[Pair], int]:
    """Return all pairs with a preference, and the number of ties."""
    pairs: list[Pair] = []
    ties = 0
    for ranking, given in zip(rankings, rewards, strict=True):
        key, levels = prompt_key(ranking.prompt), ranking.levels()
        lengths = [len(completion) for completion in ranking.completions]
        for first in range(len(levels)):
            for second in range(first + 1, len(levels)):
                if levels[first] == levels[second]:
                    ties += 1
                    continue
                won, lost = (first, second) if levels[first] < levels[second] else (second, first)
                distance = levels[lost] - levels[won]
                margin = ranking.margin if levels[won] == 0 else None
                pairs.append(Pair(key, distance, given[won] - given[lost], lengths[won] - lengths[lost], margin))
    return pairs, ties


def ranking_rewards(
    context: RewardModelContext,
    reward_model: RewardModel,
    rankings: Sequence[Ranking],
    label: str,
    processes: ProcessGroup,
) -> list[list[float]]:
    """Score the completions of each ranking; processes share the rankings, and all of them get all rewards.

    Args:
        context: of the stage; asked to stop between batches.
        reward_model: scores.
        rankings: N rankings.
        label: of the progress bar.
        processes: of the run.

    Returns:
        Per ranking one reward per completion.
    """

    total = sum(len(ranking.completions) for ranking in rankings)

    def score(own: list[Ranking]) -> list[list[float]]:
        prompts = [ranking.prompt for ranking in own for _ in ranking.completions]
        completions = [completion for ranking in own for completion in ranking.completions]
        with task(label, total, "completions", share=len(prompts)) as bar:

            def progress(done: int) -> None:
                bar.advance(done)
                context.stop.check()

            flat = iter(reward_model.score(prompts, completions, progress=progress))
        return [[next(flat) for _ in ranking.completions] for ranking in own]

    return processes.map(rankings, score)


def accuracy(rankings: Sequence[Ranking], rewards: Sequence[Sequence[float]]) -> float:
    """Return the share of pairs with a preference that the rewards order correctly; NaN if there are none."""
    pairs, _ = preferred_pairs(rankings, rewards)
    return _mean([is_right(pair.difference) for pair in pairs]) if pairs else float("nan")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _first_and_last(ranking: Ranking, rewards: Sequence[float]) -> tuple[list[float], list[float]]:
    """Rewards of the first and of the last tier."""
    best, worst = ranking.tiers[0], ranking.tiers[-1]
    return [rewards[index] for index in best], [rewards[index] for index in worst]
