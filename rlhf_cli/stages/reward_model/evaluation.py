"""Agreement of rewards with held-out rankings, compared with judges that look at length only."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlhf_cli.data.records import Ranking, prompt_key
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError
from rlhf_cli.intervals import share_interval
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.progress import task
from rlhf_cli.stages.reward_model.stage import RewardModelContext

_CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Pair:
    """Two completions of one ranking, one of which was preferred.

    Attributes:
        prompt: key of the prompt.
        distance: tiers between them, at least 1.
        difference: reward of the preferred completion minus that of the other.
        longer: characters of the preferred completion minus those of the other.
    """

    prompt: str
    distance: int
    difference: float
    longer: int


@dataclass(frozen=True)
class RankingReport:
    """Agreement of rewards with rankings, over all pairs except ties.

    Attributes:
        accuracy: share of pairs whose preferred completion has the higher reward; equal rewards count 1/2.
        low: lower end of its 95 % interval over prompts.
        high: upper end.
        always_longer: accuracy of always preferring the longer completion (in characters), on the same pairs.
        always_shorter: accuracy of always preferring the shorter one.
        by_distance: tiers between the two -> (accuracy, pairs).
        calibration_error: expected calibration error of sigmoid(difference), in 10 bins of equal width.
        mean_best: mean reward of completions in the first tier.
        mean_worst: mean reward of completions in the last tier.
        prompts: prompts with at least one pair.
        pairs: pairs that are not ties.
        ties: pairs that were skipped as ties.
        lowest: smallest reward of a completion.
        highest: largest one.
    """

    accuracy: float
    low: float
    high: float
    always_longer: float
    always_shorter: float
    by_distance: dict[int, tuple[float, int]]
    calibration_error: float
    mean_best: float
    mean_worst: float
    prompts: int
    pairs: int
    ties: int
    lowest: float = math.nan
    highest: float = math.nan


def ranking_report(rankings: Sequence[Ranking], rewards: Sequence[Sequence[float]]) -> RankingReport:
    """Compare raw rewards with rankings.

    Args:
        rankings: held-out rankings.
        rewards: per ranking one reward per completion, in the scale of the ranking loss.

    Raises:
        DataError: every pair is a tie.
    """
    pairs, ties = preferred_pairs(rankings, rewards)
    if not pairs:
        raise DataError(
            f"the {len(rankings):,} held-out rankings have no preference: every pair is a tie",
            hint="hold out more prompts with `--set data.holdout=...`, or label with a smaller `tie_margin`",
        )
    by_prompt: dict[str, list[Pair]] = defaultdict(list)
    by_distance: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_prompt[pair.prompt].append(pair)
        by_distance[pair.distance].append(pair)
    right = [sum(_right(pair.difference) for pair in own) for own in by_prompt.values()]
    low, high = share_interval(right, [len(own) for own in by_prompt.values()])
    longer = _share(pairs, lambda pair: pair.longer)
    ends = [_first_and_last(ranking, given) for ranking, given in zip(rankings, rewards, strict=True)]
    return RankingReport(
        accuracy=sum(right) / len(pairs),
        low=low,
        high=high,
        always_longer=longer,
        always_shorter=1.0 - longer,
        by_distance={
            distance: (_share(own, lambda pair: pair.difference), len(own))
            for distance, own in sorted(by_distance.items())
        },
        calibration_error=_calibration_error([pair.difference for pair in pairs]),
        mean_best=_mean([reward for best, _ in ends for reward in best]),
        mean_worst=_mean([reward for _, worst in ends for reward in worst]),
        prompts=len(by_prompt),
        pairs=len(pairs),
        ties=ties,
        lowest=min(map(min, rewards)),
        highest=max(map(max, rewards)),
    )


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
                pairs.append(Pair(key, distance, given[won] - given[lost], lengths[won] - lengths[lost]))
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

    def score(own: list[Ranking]) -> list[list[float]]:
        prompts = [ranking.prompt for ranking in own for _ in ranking.completions]
        completions = [completion for ranking in own for completion in ranking.completions]
        with task(label, len(prompts), "completions") as bar:

            def progress(done: int) -> None:
                bar.advance(done)
                context.stop.check()

            flat = iter(reward_model.score(prompts, completions, progress=progress))
        return [[next(flat) for _ in ranking.completions] for ranking in own]

    return processes.map(rankings, score)


def accuracy(rankings: Sequence[Ranking], rewards: Sequence[Sequence[float]]) -> float:
    """Return the share of pairs with a preference that the rewards order correctly; NaN if there are none."""
    pairs, _ = preferred_pairs(rankings, rewards)
    return _share(pairs, lambda pair: pair.difference) if pairs else float("nan")


def _right(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)


def _share(pairs: Sequence[Pair], difference: Callable[[Pair], float]) -> float:
    return _mean([_right(difference(pair)) for pair in pairs])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _first_and_last(ranking: Ranking, rewards: Sequence[float]) -> tuple[list[float], list[float]]:
    """Rewards of the first and of the last tier."""
    best, worst = ranking.tiers[0], ranking.tiers[-1]
    return [rewards[index] for index in best], [rewards[index] for index in worst]


def _calibration_error(differences: Sequence[float]) -> float:
    """Mean over pairs of |confidence - accuracy| of their bin (Guo et al. 2017, eq. 3).

    Confidence is sigmoid(|d|), at least 1/2, and a pair counts as right where d > 0.
    """
    gaps = torch.tensor(differences, dtype=torch.float64)
    confidence = gaps.abs().sigmoid()
    right = torch.tensor([_right(gap) for gap in differences], dtype=torch.float64)
    bins = ((confidence - 0.5) * 2 * _CALIBRATION_BINS).long().clamp(max=_CALIBRATION_BINS - 1)
    surplus = torch.zeros(_CALIBRATION_BINS, dtype=torch.float64).index_add(0, bins, confidence - right)
    return float(surplus.abs().sum() / len(differences))
