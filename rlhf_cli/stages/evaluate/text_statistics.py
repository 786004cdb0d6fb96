"""Statistics of a set of completions that reveal a policy that collapsed or repeats itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlhf_cli.plain_text import printable

__all__ = ["distinct", "most_common_share", "printable", "repeated_share"]


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


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
