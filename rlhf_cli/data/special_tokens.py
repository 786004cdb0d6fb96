"""Special tokens in text: a template writes control tokens, and what a user's text spells stays text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HIGH, _LOW = 0xD800, 0xDC00
_MARK = re.compile("([\ud800-\udbff][\udc00-\udfff])")
"""What a spelled special token is replaced with before a template is rendered: two halves of surrogate pairs as
separate characters, which no record contains, since the readers of data refuse them."""

CONTENT = "\udfff"
"""Stands for the content of a message where only its place in the rendering matters."""


class SpecialTokens:
    """The special tokens of a tokenizer.

    Added tokens that are not special, such as `<think>` in Qwen 3, are left to the tokenizer wherever they occur.

    Args:
        tokenizer: any Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        texts = sorted({*tokenizer.all_special_tokens, *added} - {""}, key=lambda text: (-len(text), text))
        self._tokenizer, self._longest = tokenizer, max(map(len, texts), default=0)
        either = "|".join(map(re.escape, texts)) or r"(?!)"
        self._pattern, self._next = re.compile(either), re.compile(rf"\s*(?:{either}|\Z)")
        marks = [chr(_HIGH + number // 1000) + chr(_LOW + number % 1000) for number in range(len(texts))]
        self._mark_of = dict(zip(texts, marks, strict=True))
        self._text_of = dict(zip(marks, texts, strict=True))

    def are_spelled_in(self, text: str) -> bool:
        """Whether a text spells a special token."""
        return self._pattern.search(text) is not None

    def id_of(self, token: str) -> int:
        """Return the id of a special token."""
        found = self._tokenizer.convert_tokens_to_ids(token)
        assert isinstance(found, int)
        return found

    def first_after(self, text: str, start: int) -> re.Match[str] | None:
        """Find the first special token at or after a position; escaped ones are not special."""
        return self._pattern.search(text, start)

    def are_next(self, text: str, position: int) -> bool:
        """Whether only white space is between a position and the next special token or the end of the text."""
        return self._next.match(text, position) is not None

    def boundary(self, text: str, position: int) -> int:
        """Return a position, or the beginning of the special token that it is inside of."""
        for found in self._pattern.finditer(text, max(0, position - self._longest)):
            if found.start() < position < found.end():
                return found.start()
            if found.start() >= position:
                break
        return position

    def found_in(self, text: str) -> frozenset[str]:
        """Return the special tokens that a text spells."""
        return frozenset(self._pattern.findall(text))

    def escape(self, text: str, only: frozenset[str] | None = None) -> str:
        """Replace the special tokens that a text spells by marks, so that `ids` reads them as text.

        Args:
            text: any text.
            only: the tokens to replace; None replaces all.
        """

        def mark(found: re.Match[str]) -> str:
            return self._mark_of[found[0]] if only is None or found[0] in only else found[0]

        return self._pattern.sub(mark, text)

    def unescape(self, text: str) -> str:
        """Undo `escape`."""
        return _MARK.sub(lambda found: self._text_of[found[0]], text)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, in which special tokens are control tokens and escaped ones are text."""
        found: list[int] = []
        for number, part in enumerate(_MARK.split(text)):
            if number % 2:
                found += ids_of(self._tokenizer, self._text_of[part], split_special_tokens=True)
            elif part:
                found += ids_of(self._tokenizer, part)
        return found


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False, **options: bool) -> list[int]:
    """Return the ids of a text; `special` adds the tokens that the tokenizer puts around every text."""
    return list(tokenizer(text, add_special_tokens=special, **options)["input_ids"])  # type: ignore[arg-type]
