"""Statistics of a set of completions that reveal a policy that collapsed or repeats itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_cli.plain_text import printable

__all__ = ["Phrase", "Phrases", "distinct", "most_common_share", "phrases", "printable", "repeated_share"]

_PHRASE_WORDS = 3
_PHRASES = 3
"""Phrases of each model that are compared."""


def most_common_share(texts: Sequence[str]) -> float:
    """Return the share of the most frequent text, ignoring case and white space: 1/N if all differ."""
    if not texts:
        return 0.0
    counts = Counter(" ".join(text.lower().split()) for text in texts)
    return counts.most_common(1)[0][1] / len(texts)


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Return distinct n-grams of words over all n-grams of the set (Li et al. 2016, section 5); 0 if there are none."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_share(texts: Sequence[str], n: int = 4) -> float:
    """Return the mean over texts of the share of their n-grams of words that occurred before in the same text."""
    shares = []
    for text in texts:
        grams = _ngrams(text, n)
        shares.append(1.0 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares) if shares else 0.0


@dataclass(frozen=True)
class Phrase:
    """Words that completions begin or end with.

    Attributes:
        text: the words, in lower case.
        baseline: share of the baseline's completions.
        policy: share of the policy's.
    """

    text: str
    baseline: float
    policy: float


@dataclass(frozen=True)
class Phrases:
    """The most common phrases of two models, those that the policy uses more often first.

    Attributes:
        openings: first words of completions.
        endings: last words.
    """

    openings: Sequence[Phrase]
    endings: Sequence[Phrase]

    def to_json(self) -> dict[str, Any]:
        """Return the plain values."""
        return asdict(self)


def phrases(baseline: Sequence[str], policy: Sequence[str]) -> Phrases:
    """Return the three most common first and last three words of both models; those of one completion are omitted.

    Args:
        baseline: completions of one model, not empty.
        policy: those of the other.
    """
    return Phrases(
        _compared(baseline, policy, lambda words: words[:_PHRASE_WORDS]),
        _compared(baseline, policy, lambda words: words[-_PHRASE_WORDS:]),
    )


def _compared(
    baseline: Sequence[str], policy: Sequence[str], part: Callable[[list[str]], list[str]]
) -> tuple[Phrase, ...]:
    counts = [Counter(" ".join(part(text.lower().split())) for text in texts) for texts in (baseline, policy)]
    # Of equally common ones the first in the alphabet, so that the order of the prompts changes nothing.
    common = [sorted(found.items(), key=lambda one: (-one[1], one[0]))[:_PHRASES] for found in counts]
    names = {text for found in common for text, count in found if text and count > 1}
    found = [Phrase(text, counts[0][text] / len(baseline), counts[1][text] / len(policy)) for text in names]
    return tuple(sorted(found, key=lambda one: (one.baseline - one.policy, one.text)))


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
