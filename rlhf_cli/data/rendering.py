"""Where the turns of the assistant are in what a chat template renders. Works on text alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rlhf_cli.data.special_tokens import SpecialTokens


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation that ends with a turn of the assistant.

    Attributes:
        prompt: what the model sees before its completion begins.
        whole: the whole conversation, as the template writes it.
        content: of the last turn, escaped.
        content_end: where the content ends in `whole`.
        turn_end: the first special token after the content, or None if the template writes none.
        stop: where that token ends in `whole`, or `content_end`.
    """

    prompt: str
    whole: str
    content: str
    content_end: int
    turn_end: str | None
    stop: int

    @property
    def continues_prompt(self) -> bool:
        """Whether the conversation begins as the prompt does. Not so with templates that open a reasoning block in the
        generation prompt and write none in the conversation."""
        return self.whole.startswith(self.prompt)

    @property
    def completion(self) -> str:
        """What follows `prompt`, up to the end of the turn; it holds what the template writes around the content, such
        as an empty reasoning block."""
        if self.continues_prompt:
            return self.whole[len(self.prompt) : self.stop]
        return self.content + self.whole[self.content_end : self.stop]


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the length of the beginning that two texts or two lists of ids share."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def locate_completion(prompt: str, whole: str, content: str, special: SpecialTokens) -> Conversation:
    """Find the completion in a rendered conversation.

    Args:
        prompt: the rendering without the last turn, with the generation prompt.
        whole: the rendering with it.
        content: of the last turn, escaped.
        special: the special tokens of the tokenizer.
    """
    start = special.boundary(whole, common_length(prompt, whole))
    content_end = _content_end(whole, content, special, start)
    found = special.first_after(whole, start if content_end is None else content_end)
    if content_end is None:  # the template rewrote the content
        content_end = len(whole) if found is None else found.start()
    turn_end, stop = (None, content_end) if found is None else (found[0], found.end())
    return Conversation(prompt, whole, content, content_end, turn_end, stop)


def _content_end(text: str, content: str, special: SpecialTokens, start: int, stop: int | None = None) -> int | None:
    """Find where the content of a turn ends: where a special token follows it, or else where it first occurs."""
    for candidate in (content, content.strip()):  # many templates strip it
        first = at = text.find(candidate, start, stop)
        while at >= 0:
            end = at + len(candidate)
            if special.are_next(text, end):
                return end
            at = text.find(candidate, at + 1, stop)
        if first >= 0:
            return first + len(candidate)
    return None


class Opening(NamedTuple):
    """The renderings that show where an earlier turn of the assistant begins.

    Attributes:
        before: the messages before the turn.
        opened: the same with the generation prompt.
        header: the whole rendering up to the content of the turn; None if the template drops the content.
        content: of the turn, escaped.
    """

    before: str
    opened: str
    header: str | None
    content: str


def _start(text: str, opening: Opening, special: SpecialTokens) -> int | None:
    """Find where an earlier turn begins to be the assistant's own; None if what is before it is rendered otherwise."""
    if text.startswith(opening.opened):
        return len(opening.opened)
    if not text.startswith(opening.before):
        return None
    # The generation prompt goes on otherwise than the conversation, such as with an empty reasoning block. What both
    # begin with is the template's; where the content begins in the same way, it is the content's.
    shared = common_length(text, opening.opened)
    is_header = opening.header is not None and text.startswith(opening.header)
    return special.boundary(text, min(shared, len(opening.header or "")) if is_header else shared)


def locate_turns(
    text: str, openings: Sequence[Opening], special: SpecialTokens, turn_end: str | None
) -> list[tuple[int, int] | None]:
    """Find earlier turns of the assistant in a rendering, as positions (start, stop) with their `turn_end`, if any.

    None stands for a turn that cannot be located: the template renders what is before it differently in a longer
    conversation, or writes no generation prompt.
    """
    starts = [_start(text, opening, special) for opening in openings]
    found: list[tuple[int, int] | None] = []
    for number, (start, opening) in enumerate(zip(starts, openings, strict=True)):
        if start is None:
            found.append(None)
            continue
        limit = next((later for later in starts[number + 1 :] if later is not None), len(text))
        content_end = _content_end(text, opening.content, special, start, limit)
        end = special.first_after(text, start if content_end is None else content_end)
        has_end = end is not None and end[0] == turn_end and end.end() <= limit
        stop = end.end() if end is not None and has_end else content_end
        found.append(None if stop is None else (start, stop))
    return found
