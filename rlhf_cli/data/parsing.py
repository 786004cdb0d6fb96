"""From rows to records: which form a row has, what its fields must be, and what is left out or only remarked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from rlhf_cli.data.comparisons import ComparisonReader, has
from rlhf_cli.data.conversations import text_of
from rlhf_cli.data.fields import apply_columns, check_columns, missing
from rlhf_cli.data.formats import Wanted, parts_of
from rlhf_cli.data.prompts import PromptReader
from rlhf_cli.data.records import Candidates, Demonstration, Kind, PromptRecord, Ranking, Record
from rlhf_cli.data.rows import Row
from rlhf_cli.data.skips import Skip
from rlhf_cli.data.values import NO_ANSWER, SkipRecordError, answer_of, is_blank
from rlhf_cli.data.warnings import Remarks


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
        self._wanted = Wanted(columns, remarks, unranked=kind == "candidates")
        self._prompts = PromptReader(remarks)
        self._comparisons = ComparisonReader(self._prompts, remarks, self._require)

    def records(self, row: Row) -> Iterator[Record | Skip]:
        """All that one row holds: one record, or what is made of another tool's form; raises `DataError`."""
        for part in parts_of(row, self._kind, self._wanted):
            if isinstance(part, Skip):
                yield part
                continue
            try:
                yield self.parse(part)
            except SkipRecordError as skip:
                yield Skip(part.place, skip.reason, part.excerpt())

    def parse(self, row: Row) -> Record:
        """The record; raises `DataError` where it is wrong and `SkipRecordError` where it is left out."""
        row = apply_columns(row, self._columns)
        parse: Callable[[Row], Record] = {
            "demonstration": self._demonstration,
            "prompt": self._prompt_record,
            "preference": self._ranking,
            "ranking": self._ranking,
            "candidates": self._candidates,
        }[self._kind]
        record = parse(row)
        is_plain_text = isinstance(record, Demonstration) and not has(row, "prompt")
        if is_blank(record.prompt) and not is_plain_text:
            self._remarks.add("empty prompt", row.place)
        return record

    # Each kind

    def _demonstration(self, row: Row) -> Demonstration:
        if name := _conversation_field(row):
            prompt, answer = self._prompts.parted_conversation(row, name)
            if answer is None:
                raise SkipRecordError(NO_ANSWER)
            return Demonstration(prompt, answer_of(answer), row.place)
        if "text" in row.fields and not has(row, "prompt") and not has(row, "completion"):
            self._prompts.keep_style(row, "strings")
            return Demonstration("", answer_of(text_of(row, "text", row.fields["text"])), row.place)
        self._require(row, "prompt", "completion")
        prompt = self._prompts.prompt(row)
        return Demonstration(prompt, answer_of(self._prompts.reply(row, "completion", prompt)), row.place)

    def _prompt_record(self, row: Row) -> PromptRecord:
        if name := _conversation_field(row) if not has(row, "prompt") else None:
            messages = self._prompts.conversation(row, name)
            if messages[-1].role == "assistant":
                messages = messages[:-1]
                self._remarks.add("answer dropped", row.place)
            if not messages:
                raise row.error(
                    f"`{name}` holds an answer alone: there is nothing to answer", "begin with a user message"
                )
            return PromptRecord(messages, row.place)
        if "prompt" not in row.fields and has(row, "chosen", "rejected"):  # HH's prompts stand in its pairs alone
            return PromptRecord(self._ranking(row).prompt, row.place)
        self._require(row, "prompt")
        return PromptRecord(self._prompts.prompt(row), row.place)

    def _ranking(self, row: Row) -> Ranking:
        wanted = ("completions", "ranking") if self._kind == "ranking" else ("chosen", "rejected")
        return self._comparisons.ranking(row, keep_blank=self._keep_blank or row.may_be_blank, wanted=wanted)

    def _candidates(self, row: Row) -> Candidates:
        return self._comparisons.candidates(row, keep_blank=self._keep_blank or row.may_be_blank)

    def _require(self, row: Row, *names: str) -> None:
        if lacking := tuple(name for name in names if name not in row.fields):
            raise missing(row, self._kind, lacking, self._columns)


def _conversation_field(row: Row) -> str | None:
    """Name of the field that holds the whole conversation; a null one counts where nothing else stands for it."""
    names = [name for name in ("messages", "conversations") if name in row.fields]
    others = any(has(row, other) for other in ("prompt", "completion", "text", "chosen"))
    return next((name for name in names if has(row, name) or not others), None)
