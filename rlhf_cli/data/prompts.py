"""What is asked: plain text or a conversation, as a field of a row, and answers that have to be of its form."""

from __future__ import annotations

from rlhf_cli.data.conversations import decoded_cell, is_conversation, messages_of, text_of, unusual_turns
from rlhf_cli.data.records import Message, Prompt
from rlhf_cli.data.rows import Row, shown
from rlhf_cli.data.warnings import Remarks


class PromptReader:
    """Reads prompts and conversations of one source, which has to use one form for all.

    Args:
        remarks: collects what deserves a warning.
    """

    def __init__(self, remarks: Remarks) -> None:
        self._remarks = remarks
        self._style: tuple[str, str] | None = None

    def prompt(self, row: Row) -> Prompt:
        """`prompt`, which ends where an answer belongs."""
        value = row.fields["prompt"]
        if not is_conversation(value):
            self.keep_style(row, "strings")
            return text_of(row, "prompt", value)
        messages = self.conversation(row, "prompt")
        if messages[-1].role == "assistant":
            raise row.error(
                "`prompt` ends with an assistant turn, and a prompt ends where an answer belongs",
                "put the answer into `completion`, or name the whole conversation `messages`",
            )
        return messages

    def conversation(self, row: Row, field: str) -> tuple[Message, ...]:
        """A list of messages."""
        value = decoded_cell(row, field, row.fields[field])
        messages, foreign = messages_of(row, field, value)
        self.keep_style(row, "messages")
        if foreign:
            self._remarks.add("sharegpt", row.place)
        if odd := unusual_turns(messages):
            self._remarks.add("turn order", row.place, odd)
        return messages

    def parted_conversation(self, row: Row, field: str) -> tuple[tuple[Message, ...], str | None]:
        """What comes before the last assistant turn, and that turn, or None if there is none."""
        messages = self.conversation(row, field)
        last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=None)
        if last is None:
            return messages, None
        if last == 0:
            raise row.error(
                f"`{field}` begins with the assistant: there is nothing to answer",
                "put the user's message before it, or name plain text `text`",
            )
        if last < len(messages) - 1:
            self._remarks.add("after answer", row.place)
        return messages[:last], messages[last].content

    def reply(self, row: Row, field: str, prompt: Prompt) -> str:
        """An answer to an explicit prompt: text, or one assistant message where the prompt is a conversation."""
        value = row.fields[field]
        if not is_conversation(value):
            return text_of(row, field, value)
        messages, _ = messages_of(row, field, value)
        if isinstance(prompt, str):
            raise row.error(
                f"mixed: `prompt` is a string and `{field}` is a list of messages",
                "give both as strings or both as messages",
            )
        if len(messages) != 1 or messages[0].role != "assistant":
            roles = ", ".join(message.role for message in messages)
            raise row.error(
                f"`{field}` has the turns {shown(roles)}; one assistant message is expected",
                "put the turns before the answer into `prompt`",
            )
        return messages[0].content

    def keep_style(self, row: Row, style: str) -> None:
        """Note that a row's prompt is `strings` or `messages`; raises `DataError` where an earlier one's was not."""
        if self._style is None:
            self._style = (style, row.place)
        elif self._style[0] != style:
            raise row.error(
                f"mixed: the prompt is given as {style} here and as {self._style[0]} at {self._style[1]}",
                "give all records of a source the same form, or split it into two files",
            )
