"""Reads prompts, which are plain text or a conversation, and completions in the same style."""

from __future__ import annotations

from rlhf_cli.data.parsing.cells import decoded_cell
from rlhf_cli.data.parsing.conversations import is_conversation, messages_of, text_of, unusual_turns
from rlhf_cli.data.readers.rows import Row, shown
from rlhf_cli.data.records import Message, Prompt
from rlhf_cli.data.skips import OmitRecordError
from rlhf_cli.data.warnings import WarningLog


class PromptReader:
    """Reads prompts and conversations of one source, which must use one style for all records.

    Args:
        warnings: collects the warnings.
    """

    def __init__(self, warnings: WarningLog) -> None:
        self._warnings = warnings
        self._style: tuple[str, str] | None = None

    def prompt(self, row: Row) -> Prompt:
        """Read `prompt`, which must end where the completion begins."""
        value = row.fields["prompt"]
        if not is_conversation(value):
            self.check_style(row, "strings")
            return text_of(row, "prompt", value)
        messages = self.conversation(row, "prompt")
        if messages[-1].role == "assistant":
            raise row.error(
                "`prompt` ends with an assistant turn, but a prompt must end before the completion",
                "put that turn into `completion`, or name the whole conversation `messages`",
            )
        return messages

    def conversation(self, row: Row, field: str, value: object = None) -> tuple[Message, ...]:
        """Read a list of messages: the field, or the value if one is given."""
        value = decoded_cell(row, field, row.fields[field]) if value is None else value
        messages, is_sharegpt = messages_of(row, field, value)
        self.check_style(row, "messages")
        if is_sharegpt:
            self._warnings.add("sharegpt", row.location)
        if unusual := unusual_turns(messages):
            self._warnings.add("turn order", row.location, unusual)
        return messages

    def split_conversation(self, row: Row, field: str, value: object = None) -> tuple[tuple[Message, ...], str | None]:
        """Split a conversation before its last assistant turn, which is returned too; None if there is none.

        Args:
            row: of the conversation.
            field: its name.
            value: the conversation, if the field is not it.
        """
        messages = self.conversation(row, field, value)
        replies = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not replies:
            return messages, None
        last = max((i for i in replies if messages[i].is_trained), default=None)
        if last is None:
            raise OmitRecordError("weight 0")
        if not all(messages[i].is_trained for i in replies if i < last):
            self._warnings.add("turns not trained", row.location)
        if last == 0:
            raise row.error(
                f"`{field}` begins with the assistant: there is no prompt",
                "put the user's message before it, or name plain text `text`",
            )
        if last < len(messages) - 1:
            self._warnings.add("after completion", row.location)
        return messages[:last], messages[last].content

    def reply(self, row: Row, field: str, value: object, prompt: Prompt) -> str:
        """Read the completion of an explicit prompt: text, or one assistant message if the prompt is a conversation."""
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
                "put the turns before it into `prompt`",
            )
        return messages[0].content

    def check_style(self, row: Row, style: str) -> None:
        """Raise `DataError` if an earlier row's prompt had another style than `style` (`strings` or `messages`)."""
        if self._style is None:
            self._style = (style, row.location)
        elif self._style[0] != style:
            raise row.error(
                f"mixed: the prompt is given as {style} here and as {self._style[0]} at {self._style[1]}",
                "give all records of a source the same style, or split it into two files",
            )
