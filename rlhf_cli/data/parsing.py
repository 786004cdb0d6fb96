"""From rows to records: which form a row has, what its fields must be, and what is left out or only remarked on."""

from __future__ import annotations

import math
from collections import Counter
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
from rlhf_cli.data.rows import Row, shown

EMPTY, BLANK = "empty completion", "completion of white space only"
EQUAL = "chosen equal to rejected"
EQUAL_RANKED = "the same completion in two tiers"
NO_ANSWER = "no assistant turn"
PROMPTS_DIFFER = "chosen and rejected differ before the last reply"
GOES_ON = "transcript does not end with a reply"

_REMARKS = {
    "empty prompt": "have an empty prompt",
    "sharegpt": "were in ShareGPT form (`from`, `value`) and were converted to `role`, `content`",
    "after answer": "go on after the last assistant turn; what follows it is not used",
    "answer dropped": "end with an answer, which is no part of a prompt and is not used",
    "common beginning": "have no `prompt`; the common beginning of `chosen` and `rejected` was taken for it",
    "turn order": "have an unusual order of turns, which the chat template has to allow",
}


class SkipRecordError(Exception):
    """A record that is left out and counted; no error of the user's."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Remarks:
    """Things worth a warning, each with its count and the first place."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, what: str, place: str, detail: str = "") -> None:
        """Count one more."""
        self._counts[what] += 1
        self._first.setdefault(what, f"{place} {detail}".strip())

    def warnings(self, source: str) -> list[str]:
        """One line each."""
        return [
            f"{source}: {count:,} record{'s' if count > 1 else ''} {_REMARKS[what]} (first: {self._first[what]})"
            for what, count in self._counts.items()
        ]


class RowParser:
    """Turns the rows of one source into records of one kind.

    Args:
        kind: what the rows should be.
        columns: our field -> theirs.
        remarks: collects what deserves a warning.
    """

    def __init__(self, kind: Kind, columns: Mapping[str, str], remarks: Remarks) -> None:
        check_columns(columns)
        self._kind, self._columns, self._remarks = kind, columns, remarks
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
        is_plain_text = (
            isinstance(record, Demonstration) and _conversation_field(row) is None and "prompt" not in row.fields
        )
        if _is_blank(record.prompt) and not is_plain_text:
            self._remarks.add("empty prompt", row.place)
        if not isinstance(record.prompt, str) and (odd := unusual_turns(record.prompt)):
            self._remarks.add("turn order", row.place, odd)
        return record

    # Each kind

    def _demonstration(self, row: Row) -> Demonstration:
        has = row.fields
        if name := _conversation_field(row):
            prompt, answer = self._parted_conversation(row, name)
            if answer is None:
                raise SkipRecordError(NO_ANSWER)
            return Demonstration(prompt, _answer(answer), row.place)
        if "text" in has and "prompt" not in has and "completion" not in has:
            self._keep_style(row, "strings")
            return Demonstration("", _answer(text_of(row, "text", has["text"])), row.place)
        self._require(row, "prompt", "completion")
        prompt = self._prompt(row)
        return Demonstration(prompt, _answer(self._reply(row, "completion", prompt)), row.place)

    def _prompt_record(self, row: Row) -> PromptRecord:
        if "prompt" in row.fields:
            return PromptRecord(self._prompt(row), row.place)
        if name := _conversation_field(row):
            messages = self._conversation(row, name)
            if messages[-1].role == "assistant":
                messages = messages[:-1]
                self._remarks.add("answer dropped", row.place)
            if not messages:
                raise row.error(
                    f"`{name}` holds an answer alone: there is nothing to answer", "begin with a user message"
                )
            return PromptRecord(messages, row.place)
        if {"chosen", "rejected"} <= row.fields.keys():  # HH as published: prompts stand in its pairs alone
            return PromptRecord(self._pair(row).prompt, row.place)
        self._require(row, "prompt")
        raise AssertionError("unreachable: `prompt` is missing here")

    def _ranking(self, row: Row) -> Ranking:
        if "completions" in row.fields and not {"chosen", "rejected"} <= row.fields.keys():
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
            which = ("messages", "a string") if is_conversation(chosen) else ("a string", "messages")
            raise row.error(
                f"mixed: `chosen` is {which[0]} ({shown(chosen, 30)}) and `rejected` is {which[1]} ({shown(rejected, 30)})",
                "give both in the same form",
            )
        prompt, replies = self._parted_pair(row)
        answers = tuple(map(_answer, replies))
        if answers[0] == answers[1]:
            raise SkipRecordError(EQUAL)
        return Ranking(prompt, answers, ((0,), (1,)), _margin(row), _annotator(row), row.place)

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
        tiers = _tiers(row, decoded_cell(row, "ranking", row.fields["ranking"]), len(answers))
        for answer in answers:
            _answer(answer)
        of_tier = [{answers[index] for index in tier} for tier in tiers]
        if sum(map(len, of_tier)) != len(set(answers)):
            raise SkipRecordError(EQUAL if len(answers) == 2 else EQUAL_RANKED)
        return Ranking(prompt, answers, tiers, _margin(row), _annotator(row), row.place)


def _conversation_field(row: Row) -> str | None:
    return next((name for name in ("messages", "conversations") if row.fields.get(name) is not None), None) or next(
        (name for name in ("messages", "conversations") if name in row.fields and "prompt" not in row.fields), None
    )


def _is_whole(value: object) -> bool:
    """Whether a list of messages is a whole conversation rather than the answer alone."""
    return isinstance(value, list) and len(value) > 1


def _is_blank(prompt: Prompt) -> bool:
    if isinstance(prompt, str):
        return not prompt.strip()
    return not any(message.content.strip() for message in prompt if message.role != "system")


def _answer(text: str) -> str:
    if not text:
        raise SkipRecordError(EMPTY)
    if not text.strip():
        raise SkipRecordError(BLANK)
    return text


def _tiers(row: Row, value: object, count: int) -> tuple[tuple[int, ...], ...]:
    hint = f"tiers, best first, each a list of indices: `[[2], [0, 1]]`; each of 0 to {count - 1} exactly once"
    if not isinstance(value, list) or not all(isinstance(tier, list) and tier for tier in value):
        raise row.error(f"`ranking` is {shown(value)}; a list of tiers that are lists is expected", hint)
    indices = [index for tier in value for index in tier]
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool):
            raise row.error(f"`ranking` holds {shown(index)}, which is no index: {shown(value)}", hint)
        if not 0 <= index < count:
            raise row.error(f"`ranking` holds {index}, and there are {count} completions: {shown(value)}", hint)
        if indices.count(index) > 1:
            raise row.error(f"`ranking` holds {index} more than once: {shown(value)}", hint)
    if absent := sorted(set(range(count)) - set(indices)):
        raise row.error(f"`ranking` leaves out {', '.join(map(str, absent))}: {shown(value)}", hint)
    return tuple(tuple(tier) for tier in value)


def _margin(row: Row) -> float | None:
    value = row.fields.get("margin")
    if row.is_text and isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = float(value)
        except ValueError:
            pass  # reported below, as what it is
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise row.error(
            f"`margin` is {shown(value)}; a finite number is expected", "leave `margin` out where it is unknown"
        )
    return float(value)


def _annotator(row: Row) -> str | None:
    value = row.fields.get("annotator")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise row.error(f"`annotator` is {shown(value)}; a name or a number is expected")
    return text_of(row, "annotator", str(value))
