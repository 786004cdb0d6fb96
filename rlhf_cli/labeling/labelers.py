"""Who says which answer is better, and how scores become a ranking.

A labeler scores answers, and scores become tiers. A person or a judge, who compares answers with one another,
writes the same rankings directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rlhf_cli.data.records import Prompt, Ranking
from rlhf_cli.rewards.base import Reward
from rlhf_cli.rewards.validation import finite_scores

if TYPE_CHECKING:
    from rlhf_cli.models.reward_model.model import RewardModel


_PROMPTS_AT_ONCE = 64


class Labeler(Protocol):
    """Scores answers; whoever scores does so for each answer alone, higher is better."""

    def score(self, prompts: list[Prompt], completions: list[str]) -> list[float]:
        """One finite score each.

        Args:
            prompts: N, one for each completion.
            completions: N answers as text.
        """
        ...


@dataclass(frozen=True)
class FunctionLabeler:
    """Scores by a Python function of text."""

    function: Reward

    def score(self, prompts: list[Prompt], completions: list[str]) -> list[float]:
        """See `Labeler`; a score that is not finite is an error, since no ranking could place it."""
        return finite_scores(self.function, prompts, completions)


@dataclass(frozen=True)
class RewardModelLabeler:
    """Scores by a trained reward model."""

    scorer: RewardModel
    batch_size: int

    def score(self, prompts: list[Prompt], completions: list[str]) -> list[float]:
        """See `Labeler`."""
        return self.scorer.score(prompts, completions, batch_size=self.batch_size)


def score_answers(
    labeler: Labeler,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]],
    *,
    stop: Callable[[], object] = lambda: None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[list[float]]:
    """Scores of several answers to each prompt.

    Equal answers to one prompt are scored once: a model gives them scores that differ in the last bit, by their place
    in a batch, and no ranking should say that a text is better than itself.

    Args:
        labeler: who scores.
        prompts: N.
        answers: N lists of texts.
        stop: called between batches; may raise.
        progress: called with the number of answers that were scored.
    """
    scores: list[list[float]] = []
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        stop()
        groups = answers[start : start + _PROMPTS_AT_ONCE]
        distinct = [
            (prompt, text)
            for prompt, group in zip(prompts[start : start + _PROMPTS_AT_ONCE], groups, strict=True)
            for text in dict.fromkeys(group)
        ]
        given = iter(labeler.score([prompt for prompt, _ in distinct], [text for _, text in distinct]))
        for group in groups:
            of_text = {text: next(given) for text in dict.fromkeys(group)}
            scores.append([of_text[text] for text in group])
            progress(len(group))
    return scores


def tiers_from_scores(scores: Sequence[float], tie_margin: float = 0.0) -> tuple[tuple[int, ...], ...]:
    """Rank by score, best first; a tier holds all that are within `tie_margin` of its best.

    The margin is measured from the best of a tier, not from neighbor to neighbor, so that a chain of small
    differences does not make the best and the worst equal.

    Args:
        scores: (K,) finite.
        tie_margin: largest difference that counts as none.

    Returns:
        Tiers of indices into `scores`, in rising order within a tier.
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
class LabelStatistics:
    """What a set of rankings looks like.

    Attributes:
        prompts: how many there are.
        completions: answers in all.
        mean_tiers: tiers a prompt.
        tie_share: share of pairs of answers that are tied.
        mean_characters: of an answer.
        longest_wins: share of untied pairs of unlike length whose longer answer wins.
    """

    prompts: int
    completions: int
    mean_tiers: float
    tie_share: float
    mean_characters: float
    longest_wins: float | None

    @staticmethod
    def of(rankings: Sequence[Ranking]) -> LabelStatistics:
        """Count over at least one ranking."""
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
        return LabelStatistics(
            prompts=len(rankings),
            completions=completions,
            mean_tiers=tiers / len(rankings),
            tie_share=ties / pairs,
            mean_characters=characters / completions,
            longest_wins=longer / unlike if unlike else None,
        )
