"""From rows to records: which form a row has, what its fields must be, and what is left out or only remarked on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rlhf_cli.data.conversations import (
    HUMAN,
    decoded_cell,
    is_conversation,
    is_transcript,
    messages_of,
    part_common,
    part_transcript,
    text_of,
    unusual_turns,
)
from rlhf_cli.data.fields import apply_columns, check_columns, missing
from rlhf_cli.data.records import Demonstration, Kind, Message, Prompt, PromptRecord, Ranking, Record
from rlhf_cli.data.remarks import Remarks
from rlhf_cli.data.rows import Row, shown
from rlhf_cli.data.values import (
    EQUAL,
    EQUAL_RANKED,
    GOES_ON,
    NO_ANSWER,
    PROMPTS_DIFFER,
    SkipRecordError,
    annotator_of,
    answer_of,
    is_blank,
    margin_of,
    tiers_of,
)


class RowParser:
    """Turns the rows of one source into records of one kind.

    Args:
        kind: what the rows should be.
        columns: our field -> theirs.
        remarks: collects what deserves a warning.
        keep_blank: rankings may hold empty answers: a model gave them, and to rank them low is to learn from them.
    """

    def __init__(self, kind: Kind, columns: Mapping[str, str], remarks: Remarks, *, keep_blank: bool = False) -> None:
        check_columns(columns)
        self._keep_blank = keep_blank
        self._kind: Kind = kind
        self._columns, self._remarks = columns, remarks
        self._style: tuple[str, str] | None = None

    def parse(self, row: Row) -> Record:
        """The record; raises `DataError` where it is wrong and `SkipRecordError` where it is left out."""
        row = apply_columns(row, self._columns)
        parse: Callable[[Row], Record] = {
            "demonstration": self._demonstration,
            "prompt": self._prompt_record,
            "preference": self._ranking,
            "ranking": self._ranking,
        }[self._kind]
        record = parse(row)
        is_plain_text = isinstance(record, Demonstration) and not _has(row, "prompt")
        if is_blank(record.prompt) and not is_plain_text:
            self._remarks.add("empty prompt", row.place)
        return record

    # Each kind

    def _demonstration(self, row: Row) -> Demonstration:
        if name := _conversation_field(row):
            prompt, answer = self._parted_conversation(row, name)
            if answer is None:
                raise SkipRecordError(NO_ANSWER)
            return Demonstration(prompt, answer_of(answer), row.place)
        if "text" in row.fields and not _has(row, "prompt") and not _has(row, "completion"):
            self._keep_style(row, "strings")
            return Demonstration("", answer_of(text_of(row, "text", row.fields["text"])), row.place)
        self._require(row, "prompt", "completion")
        prompt = self._prompt(row)
        return Demonstration(prompt, answer_of(self._reply(row, "completion", prompt)), row.place)

    def _prompt_record(self, row: Row) -> PromptRecord:
        if name := _conversation_field(row) if not _has(row, "prompt") else None:
            messages = self._conversation(row, name)
            if messages[-1].role == "assistant":
                messages = messages[:-1]
                self._remarks.add("answer dropped", row.place)
            if not messages:
                raise row.error(
                    f"`{name}` holds an answer alone: there is nothing to answer", "begin with a user message"
                )
            return PromptRecord(messages, row.place)
        if "prompt" not in row.fields and _has(row, "chosen", "rejected"):  # HH's prompts stand in its pairs alone
            return PromptRecord(self._pair(row).prompt, row.place)
        self._require(row, "prompt")
        return PromptRecord(self._prompt(row), row.place)

    def _ranking(self, row: Row) -> Ranking:
        if "completions" in row.fields and not _has(row, "chosen", "rejected"):
            return self._group(row)
        if "chosen" not in row.fields and "rejected" not in row.fields:
            self._require(row, *(("completions", "ranking") if self._kind == "ranking" else ("chosen", "rejected")))
        return self._pair(row)

    def _require(self, row: Row, *names: str) -> None:
        if lacking := tuple(name for name in names if name not in row.fields):
            raise missing(row, self._kind, lacking, self._columns)

    # Prompts and conversations

    def _prompt(self, row: Row) -> Prompt:
        value = row.fields["prompt"]
        if not is_conversation(value):
            self._keep_style(row, "strings")
            return text_of(row, "prompt", value)
        messages = self._conversation(row, "prompt")
        if messages[-1].role == "assistant":
            raise row.error(
                "`prompt` ends with an assistant turn, and a prompt ends where an answer belongs",
                "put the answer into `completion`, or name the whole conversation `messages`",
            )
        return messages

    def _conversation(self, row: Row, field: str) -> tuple[Message, ...]:
        value = decoded_cell(row, field, row.fields[field])
        messages, foreign = messages_of(row, field, value)
        self._keep_style(row, "messages")
        if foreign:
            self._remarks.add("sharegpt", row.place)
        if odd := unusual_turns(messages):
            self._remarks.add("turn order", row.place, odd)
        return messages

    def _parted_conversation(self, row: Row, field: str) -> tuple[Prompt, str | None]:
        """What comes before the last assistant turn, and that turn, or None if there is none."""
        messages = self._conversation(row, field)
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

    def _reply(self, row: Row, field: str, prompt: Prompt) -> str:
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

    def _keep_style(self, row: Row, style: str) -> None:
        if self._style is None:
            self._style = (style, row.place)
        elif self._style[0] != style:
            raise row.error(
                f"mixed: the prompt is given as {style} here and as {self._style[0]} at {self._style[1]}",
                "give all records of a source the same form, or split it into two files",
            )

    # Comparisons

    def _pair(self, row: Row) -> Ranking:
        self._require(row, "chosen", "rejected")
        chosen, rejected = row.fields["chosen"], row.fields["rejected"]
        if is_conversation(chosen) != is_conversation(rejected):
            raise row.error(
                f"mixed: one of `chosen` ({shown(chosen, 30)}) and `rejected` ({shown(rejected, 30)}) is a string and "
                "the other a list of messages",
                "give both in the same form",
            )
        prompt, replies = self._parted_pair(row)
        answers = tuple(map(answer_of, replies))
        if answers[0] == answers[1]:
            raise SkipRecordError(EQUAL)
        return Ranking(prompt, answers, ((0,), (1,)), margin_of(row), annotator_of(row), row.place)

    def _parted_pair(self, row: Row) -> tuple[Prompt, tuple[str, str]]:
        chosen, rejected = row.fields["chosen"], row.fields["rejected"]
        whole = is_conversation(chosen) and _is_whole(chosen) and _is_whole(rejected)
        if "prompt" in row.fields and not whole:
            prompt = self._prompt(row)
            return prompt, (self._reply(row, "chosen", prompt), self._reply(row, "rejected", prompt))
        if is_conversation(chosen):
            return self._parted_conversations(row)
        first, second = text_of(row, "chosen", chosen), text_of(row, "rejected", rejected)
        self._keep_style(row, "strings")
        if first == second:
            raise SkipRecordError(EQUAL)
        if not is_transcript(first) and not is_transcript(second):
            self._remarks.add("common beginning", row.place)
            better, worse = part_common(first, second)
            return better.prompt, (better.completion, worse.completion)
        if not (is_transcript(first) and is_transcript(second)):
            raise SkipRecordError(PROMPTS_DIFFER)
        better, worse = part_transcript(first), part_transcript(second)
        if better.prompt != worse.prompt:
            raise SkipRecordError(PROMPTS_DIFFER)
        if HUMAN in better.completion or HUMAN in worse.completion:
            raise SkipRecordError(GOES_ON)
        return better.prompt, (better.completion, worse.completion)

    def _parted_conversations(self, row: Row) -> tuple[Prompt, tuple[str, str]]:
        """The prompt of two whole conversations that differ in their last turn alone."""
        (before, better), (before_worse, worse) = (
            self._parted_conversation(row, field) for field in ("chosen", "rejected")
        )
        if better is None or worse is None:
            raise SkipRecordError(NO_ANSWER)
        if before != before_worse:
            raise SkipRecordError(PROMPTS_DIFFER)
        return before, (better, worse)

    def _group(self, row: Row) -> Ranking:
        self._require(row, "prompt", "completions", "ranking")
        prompt = self._prompt(row)
        completions = decoded_cell(row, "completions", row.fields["completions"])
        if not isinstance(completions, list) or len(completions) < 2:
            raise row.error(
                f"`completions` is {shown(completions)}; a list of at least two answers is expected",
                '`"completions": ["one answer", "another"]`',
            )
        answers = tuple(text_of(row, f"completions[{i}]", value) for i, value in enumerate(completions))
        tiers = tiers_of(row, decoded_cell(row, "ranking", row.fields["ranking"]), len(answers))
        for answer in () if self._keep_blank else answers:
            answer_of(answer)
        of_tier = [{answers[index] for index in tier} for tier in tiers]
        if sum(map(len, of_tier)) != len(set(answers)):
            raise SkipRecordError(EQUAL if len(answers) == 2 else EQUAL_RANKED)
        return Ranking(prompt, answers, tiers, margin_of(row), annotator_of(row), row.place)


def _has(row: Row, *names: str) -> bool:
    """Whether all these fields are there and not null: tables of several forms fill the others' columns with null."""
    return all(row.fields.get(name) is not None for name in names)


def _conversation_field(row: Row) -> str | None:
    """Name of the field that holds the whole conversation; a null one counts where nothing else stands for it."""
    names = [name for name in ("messages", "conversations") if name in row.fields]
    others = any(_has(row, other) for other in ("prompt", "completion", "text", "chosen"))
    return next((name for name in names if _has(row, name) or not others), None)


def _is_whole(value: object) -> bool:
    """Whether a list of messages is a whole conversation rather than the answer alone."""
    return isinstance(value, list) and len(value) > 1
