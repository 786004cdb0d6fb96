"""Whether a chat template takes the records, and what it makes of them. Renders text, and makes no ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Demonstration, PromptRecord, Record, messages_of
from rlhf_cli.errors import DataError, ModelError
from rlhf_cli.progress import warn


def check_records(prompt_format: PromptFormat, records: Iterable[Record]) -> None:
    """Check that the template takes the records, and warn of what it makes of them.

    One conversation per order of turns is rendered, since templates differ in the orders they allow.

    Raises:
        DataError: the template refuses one, or the tokenizer has no template; names the record.
    """
    seen: set[tuple[str, ...]] = set()
    as_text = as_control = 0  # records that spell special tokens
    for record in records:
        is_bare = record.prompt == "" and isinstance(record, Demonstration)
        is_chat = prompt_format.is_chat(record.prompt) and not is_bare and not prompt_format.is_encoder
        if any(map(prompt_format.spells_special_token, _texts(record))):
            is_text = prompt_format.keeps_text(record.prompt) and not is_bare
            as_text, as_control = as_text + is_text, as_control + (not is_text)
        roles = tuple(message.role for message in messages_of(record.prompt))
        if is_chat and roles not in seen:
            seen.add(roles)
            _check_conversation(prompt_format, record, roles)
    name = prompt_format.name
    if as_text:
        warn(f"{_records(as_text)} with special tokens of {name} in their text: they are read as text")
    if as_control:
        warn(
            f"{_records(as_control)} with special tokens of {name} in their text: without a chat template, they are "
            "read as control tokens"
        )


def _check_conversation(prompt_format: PromptFormat, record: Record, roles: tuple[str, ...]) -> None:
    try:
        if isinstance(record, PromptRecord):
            prompt_format.prompt_string(record.prompt)
            return
        chat = prompt_format.conversation(record.prompt, "a")
    except ModelError as error:
        raise DataError(f"{record.location}: the turns {', '.join(roles)}: {error.message}", hint=error.hint) from error
    if not chat.continues_prompt:
        warn(
            f"the chat template of {prompt_format.name} ends a prompt with {chat.prompt[-30:]!r}, but writes something "
            "else there in a whole conversation: completions of the data are trained on directly after such a prompt"
        )


def _texts(record: Record) -> Iterator[str]:
    yield from (message.content for message in messages_of(record.prompt))
    yield from [record.completion] if isinstance(record, Demonstration) else getattr(record, "completions", ())


def _records(count: int) -> str:
    return f"{count:,} record{'s' * (count > 1)}"
