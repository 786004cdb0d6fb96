"""Phrases that completions share, and repetition within a completion, in words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

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


def phrase_shares(prompts: Sequence[str], texts: Sequence[str]) -> dict[Phrase, float]:
    """Return phrase -> share of the different prompts that have a completion with it; without those of one prompt.

    Args:
        prompts: N prompts; several completions of one prompt count once.
        texts: N completions.
    """
    own: dict[str, set[Phrase]] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        own.setdefault(prompt, set()).update(phrases_of(text))
    counts = Counter(phrase for phrases in own.values() for phrase in phrases)
    return {phrase: count / len(own) for phrase, count in counts.items() if count > 1}


def most_risen(now: Mapping[Phrase, float], before: Mapping[Phrase, float]) -> tuple[Phrase, float]:
    """Return the phrase whose share rose the most, and by how much; an empty one where none is shared."""
    risen = {phrase: share - before.get(phrase, 0.0) for phrase, share in now.items()}
    phrase = max(risen, key=lambda one: (risen[one], one), default=())
    return phrase, risen.get(phrase, 0.0)


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
