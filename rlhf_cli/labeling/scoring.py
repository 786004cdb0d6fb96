"""Scores completions, and converts scores to rankings.

Annotators and judges compare completions with one another and produce rankings directly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rlhf_cli.data.records import Prompt, Ranking
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.rewards.base import NO_COLUMNS, Columns, Reward
from rlhf_cli.rewards.validation import finite_scores

if TYPE_CHECKING:
    from rlhf_cli.models.reward_model.model import RewardModel


_PROMPTS_AT_ONCE = 64


class CompletionScorer(Protocol):
    """Scores each completion on its own; higher is better."""

    def score(self, prompts: list[Prompt], completions: list[str]) -> list[float]:
        """Score each completion; scores are finite.

        Args:
            prompts: N, one per completion.
            completions: N texts.
        """
        ...

    def calls(self, own: int) -> int:
        """Return how often to call `score`, if this process needs `own` calls: all processes of the run ask at the same
        time, and those that score together call equally often, at last maybe without completions."""
        ...


@dataclass(frozen=True)
class FunctionScorer:
    """Scores with a Python function.

    Attributes:
        function: the function.
        columns: N prompts and N texts -> what else is known about these completions.
    """

    function: Reward
    columns: Callable[[list[Prompt], list[str]], Columns] = lambda prompts, completions: NO_COLUMNS

    def score(self, prompts: list[Prompt], completions: list[str]) -> list[float]:
        """See `CompletionScorer`; raises an error for a score that is not finite."""
        return finite_scores(self.function, prompts, completions, self.columns(prompts, completions))

    def calls(self, own: int) -> int:
        """See `CompletionScorer`; a function runs in one process."""
        return own


@dataclass(frozen=True)
class RewardModelScorer:
    """Scores with a trained reward model."""

    model: RewardModel
    batch_size: int

    def score(self, prompts: list[Prompt], completions: list[str]) -> list[float]:
        """See `CompletionScorer`."""
        return self.model.score(prompts, completions, batch_size=self.batch_size)

    def calls(self, own: int) -> int:
        """See `CompletionScorer`."""
        return max(ProcessGroup(self.model.device).all_gather_object(own)) if self.model.is_sharded else own


def score_completions(
    scorer: CompletionScorer,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    *,
    stop: Callable[[], object] = lambda: None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[list[float]]:
    """Score several completions of each prompt.

    Equal completions of a prompt are scored once: a model scores them slightly differently, depending on their
    position in a batch, but a ranking must not prefer a text to itself.

    Args:
        scorer: see `CompletionScorer`.
        prompts: N.
        completions: N lists of texts.
        stop: called between batches; may raise.
        progress: called with the number of completions scored.
    """
    scores: list[list[float]] = []
    calls = scorer.calls(math.ceil(len(prompts) / _PROMPTS_AT_ONCE))
    for start in range(0, calls * _PROMPTS_AT_ONCE, _PROMPTS_AT_ONCE):
        stop()
        groups = completions[start : start + _PROMPTS_AT_ONCE]
        distinct = [
            (prompt, text)
            for prompt, group in zip(prompts[start : start + _PROMPTS_AT_ONCE], groups, strict=True)
            for text in dict.fromkeys(group)
        ]
        given = iter(scorer.score([prompt for prompt, _ in distinct], [text for _, text in distinct]))
        for group in groups:
            of_text = {text: next(given) for text in dict.fromkeys(group)}
            scores.append([of_text[text] for text in group])
            progress(len(group))
    return scores


def tiers_from_scores(scores: Sequence[float], tie_margin: float = 0.0) -> tuple[tuple[int, ...], ...]:
    """Rank by score, best first; a tier holds all completions within `tie_margin` of its best one.

    The margin is measured from the best of a tier, not between neighbors, so a chain of small differences cannot put
    the best and the worst in one tier.

    Args:
        scores: (K,) finite.
        tie_margin: largest difference that counts as a tie.

    Returns:
        Tiers of indices into `scores`, in ascending order within a tier.
    """
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    tiers: list[list[int]] = []
    best = 0.0
    for index in order:
        if tiers and best - scores[index] <= tie_margin:
            tiers[-1].append(index)
        else:
            tiers.append([index])
            best = scores[index]
    return tuple(tuple(sorted(tier)) for tier in tiers)


@dataclass(frozen=True)
class RankingStatistics:
    """Descriptive statistics of a set of rankings.

    Attributes:
        prompts: number of rankings.
        completions: total.
        mean_tiers: mean number of tiers per prompt.
        tie_share: share of pairs of completions that are tied.
        mean_characters: mean length of a completion.
        longest_wins: share of untied pairs of different length whose longer completion wins.
    """

    prompts: int
    completions: int
    mean_tiers: float
    tie_share: float
    mean_characters: float
    longest_wins: float | None

    @staticmethod
    def of(rankings: Sequence[Ranking]) -> RankingStatistics:
        """Compute over at least one ranking."""
        pairs = ties = longer = unlike = characters = completions = tiers = 0
        for ranking in rankings:
            levels, lengths = ranking.levels(), [len(text) for text in ranking.completions]
            completions += len(lengths)
            characters += sum(lengths)
            tiers += len(ranking.tiers)
            for a in range(len(lengths)):
                for b in range(a):
                    pairs += 1
                    ties += levels[a] == levels[b]
                    if levels[a] != levels[b] and lengths[a] != lengths[b]:
                        unlike += 1
                        longer += (levels[a] < levels[b]) == (lengths[a] > lengths[b])
        return RankingStatistics(
            prompts=len(rankings),
            completions=completions,
            mean_tiers=tiers / len(rankings),
            tie_share=ties / pairs,
            mean_characters=characters / completions,
            longest_wins=longer / unlike if unlike else None,
        )
