"""Formats of conversations: message lists, ShareGPT's `from`/`value`, and the transcripts of Anthropic's HH."""

from __future__ import annotations

import difflib
import itertools
import re
from typing import NamedTuple

from rlhf_cli.data.parsing.cells import refuse_notation
from rlhf_cli.data.readers.rows import Row, listed, shown
from rlhf_cli.data.records import Message
from rlhf_cli.data.skips import SkipRecordError

ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}
"""Role in files of several tools -> ours."""
TOOL_CALLS = "tool calls, which are not read"
MEDIA = "images, audio or video, which are not read"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def text_of(row: Row, field: str, value: object) -> str:
    """Check that a value is text that a tokenizer accepts, and return it."""
    if value is None:
        raise row.error(f"`{field}` is null; text is expected", f"give `{field}` a text, or remove the record")
    if not isinstance(value, str):
        raise row.error(
            f"`{field}` is {shown(value)}, {_type(value)}; text is expected",
            'put text in double quotes: "…"'
            if not isinstance(value, list | dict)
            else "name the column that holds the text with `--set 'data.columns={ours: yours}'`, or write this one as "
            "text",
        )
    refuse_notation(row, field, value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise row.error(
            f"`{field}` holds half a surrogate pair, \\u{code:04x}, at character {error.start + 1}: {shown(value)}",
            "the text was cut inside an emoji or similar; fix the program that writes the file",
        ) from error
    return value


def _type(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def is_conversation(value: object) -> bool:
    """Whether a value is meant as a list of messages."""
    return isinstance(value, list)


def messages_of(row: Row, field: str, value: object) -> tuple[tuple[Message, ...], bool]:
    """Messages of a conversation, and whether they were in ShareGPT's format."""
    if value is None:
        raise row.error(f"`{field}` is null; a list of messages is expected", f"give `{field}` messages, or remove it")
    if not isinstance(value, list):
        if isinstance(value, str):
            refuse_notation(row, field, value)
        raise row.error(
            f"`{field}` is {shown(value)}, {_type(value)}; a list of messages is expected",
            '`[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]`',
        )
    if not value:
        raise row.error(f"`{field}` is [], an empty conversation", "give it at least one message, or remove the record")
    turns = [_message(row, f"{field}[{index}]", turn) for index, turn in enumerate(value)]
    return tuple(turn for turn, _ in turns), any(is_sharegpt for _, is_sharegpt in turns)


def _message(row: Row, field: str, value: object) -> tuple[Message, bool]:
    if not isinstance(value, dict):
        raise row.error(
            f"`{field}` is {shown(value)}, which is not a message", 'a message is `{"role": "user", "content": "…"}`'
        )
    is_sharegpt = "from" in value and "role" not in value
    role_name = "from" if is_sharegpt else "role"
    content_name = "value" if "value" in value and "content" not in value else "content"
    if value.get("tool_calls") or value.get("function_call"):
        raise SkipRecordError(TOOL_CALLS)
    for name in (role_name, content_name):
        if name not in value:
            raise row.error(
                f"`{field}` has no `{name}`: it has {listed(value)}", 'a message is `{"role": "user", "content": "…"}`'
            )
    role = text_of(row, f"{field}.{role_name}", value[role_name])
    known = _ROLES.get(role.strip().lower())
    if known is None:
        near = difflib.get_close_matches(role.lower(), _ROLES, n=1)
        raise row.error(
            f"`{field}.{role_name}` is {shown(role)}"
            + (f", did you mean `{near[0]}`?" if near else ", an unknown role"),
            f"roles are {', '.join(_ROLES)}",
        )
    content = text_of(row, f"{field}.{content_name}", _joined_parts(value[content_name]))
    return Message(known, content, value.get("weight") not in (0, "0")), is_sharegpt


def _joined_parts(content: object) -> object:
    """The text of a content in parts (`[{"type": "text", "text": "…"}]`); another value is returned as it is."""
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        return content
    if any(part.get("type", "text") not in ("text", "input_text", "output_text") for part in content):
        raise SkipRecordError(MEDIA)
    texts = [part.get("text") for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content  # type: ignore[arg-type]


def unusual_turns(messages: tuple[Message, ...]) -> str | None:
    """Describe an unusual order of turns; None if it is usual. The chat template decides whether it is allowed."""
    roles = [message.role for message in messages if message.role not in ("system", "developer")]
    if roles and roles[0] == "assistant":
        return "begins with the assistant"
    for before, after in itertools.pairwise(roles):
        if before == after and before != "tool":
            return f"has two {before} turns in a row"
    return None


def is_transcript(text: str) -> bool:
    """Whether text is a dialogue in the format of Anthropic's HH: turns marked `Human:` and `Assistant:`."""
    return ASSISTANT in text


class SplitText(NamedTuple):
    """A text split into prompt and completion; concatenated they are the original."""

    prompt: str
    completion: str


def split_transcript(text: str) -> SplitText:
    """Split a transcript after its last `Assistant:`; both parts keep their white space.

    The result stays text and does not become messages, so that a base model without a chat template can learn from it
    too. Users who want messages convert the file.
    """
    at = text.rfind(ASSISTANT) + len(ASSISTANT)
    return SplitText(text[:at], text[at:])


def turns_of_transcript(text: str) -> tuple[Message, ...] | None:
    """The stripped turns of a transcript that ends where a completion begins; None for other texts."""
    pieces = re.split(f"({HUMAN}|{ASSISTANT})", text)
    marks, turns = pieces[1::2], [piece.strip() for piece in pieces[2::2]]
    if pieces[0].strip() or not marks or marks[-1] != ASSISTANT or turns[-1] or not all(turns[:-1]):
        return None
    roles = {HUMAN: "user", ASSISTANT: "assistant"}
    return tuple(Message(roles[mark], turn) for mark, turn in zip(marks[:-1], turns[:-1], strict=True)) or None


def split_common_beginning(first: str, second: str) -> tuple[SplitText, SplitText]:
    """Split two texts where they begin to differ, at the white space before that (as TRL does)."""
    at, shortest = 0, min(len(first), len(second))
    while at < shortest and first[at] == second[at]:
        at += 1
    while at > 0 and (at == shortest or not (first[at].isspace() and second[at].isspace())):
        at -= 1
    return SplitText(first[:at], first[at:]), SplitText(second[:at], second[at:])
