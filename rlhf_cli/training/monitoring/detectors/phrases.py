"""Phrases that completions share, and repetition within a completion, in words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Phrase = tuple[str, ...]

WORDS = 3
"""Words of a phrase. Punctuation is a word, and so are the two ends of a completion: `Good luck!` at an end is one."""
START, END = "<start>", "<end>"

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w[\w'\u2019]*|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Return the words and punctuation marks of a text in lower case; of Chinese and Japanese, the characters."""
    return _WORD.findall(text.lower())


def phrases_of(text: str) -> set[Phrase]:
    """Return the phrases of a text."""
    words = [START, *words_of(text), END]
    return {tuple(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)}


@dataclass(frozen=True)
class Use:
    """How the completions of a step use a phrase.

    Attributes:
        share: of the different prompts that have a completion with it; several completions of one prompt count once.
        count: completions with it.
        excess: sum over them of the reward less the mean reward of the step.
    """

    share: float
    count: int
    excess: float


def phrase_uses(prompts: Sequence[str], texts: Sequence[str], scores: Sequence[float]) -> dict[Phrase, Use]:
    """Return the phrases that completions of several prompts share.

    Args:
        prompts: N prompts.
        texts: N completions.
        scores: N rewards.
    """
    mean = sum(scores) / len(scores)
    holders: dict[Phrase, set[str]] = {}
    counts: Counter[Phrase] = Counter()
    excess: dict[Phrase, float] = {}
    for prompt, text, score in zip(prompts, texts, scores, strict=True):
        for phrase in phrases_of(text):
            holders.setdefault(phrase, set()).add(prompt)
            counts[phrase] += 1
            excess[phrase] = excess.get(phrase, 0.0) + score - mean
    different = len(set(prompts))
    return {
        phrase: Use(len(own) / different, counts[phrase], excess[phrase])
        for phrase, own in holders.items()
        if len(own) > 1
    }


def rise(share: float, start: float) -> float:
    """Return the rise of a share relative to what was left to rise, but to at least a half: a template of most
    completions has not become one of all because a few more have it."""
    return (share - start) / max(1.0 - start, 0.5)


def as_text(phrase: Phrase) -> str:
    """Return a phrase for people, such as `good luck!`."""
    plain = re.sub(r" ([^\w\s])", r"\1", " ".join(word for word in phrase if word not in (START, END)))
    return plain.lstrip(" .,;:!?") or plain


def longest_shared(phrase: Phrase, texts: Sequence[str], *, share: float = 0.9, most: int = 12) -> Phrase:
    """Extend a phrase to both sides while this share of the texts that contain it agree.

    Args:
        phrase: as it is found.
        texts: of which some contain it.
        share: of those.
        most: words of the result.
    """
    sequences = [(START, *words_of(text), END) for text in texts]
    onwards = _extended(phrase, sequences, share, most)
    return _extended(onwards[::-1], [words[::-1] for words in sequences], share, most)[::-1]


def _extended(phrase: Phrase, sequences: Sequence[Phrase], share: float, most: int) -> Phrase:
    """Extend a phrase to the right."""
    rest = [words[end:] for words in sequences if (end := _end_of(phrase, words)) is not None]
    for ahead in range(most - len(phrase)):
        following = Counter(words[ahead] for words in rest if len(words) > ahead)
        word, count = following.most_common(1)[0] if following else ("", 0)
        if count == 0 or count < share * len(rest):
            break
        phrase = (*phrase, word)
        rest = [words for words in rest if len(words) > ahead and words[ahead] == word]
    return phrase


def _end_of(phrase: Phrase, words: Phrase) -> int | None:
    """Return the position after the first occurrence."""
    size = len(phrase)
    return next((at + size for at in range(len(words) - size + 1) if words[at : at + size] == phrase), None)


def repeated_share(text: str, n: int = 4) -> float:
    """Return the share of a text's sequences of `n` words that it had before; 0 for a text with fewer words."""
    words = words_of(text)
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
