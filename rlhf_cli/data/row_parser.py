"""Rows to records: detects the format of a row, checks its fields, and skips or warns about records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from rlhf_cli.data.formats import ImportOptions, convert_row
from rlhf_cli.data.formats.rated_rows import RatedRows
from rlhf_cli.data.parsing.cells import decode_cells
from rlhf_cli.data.parsing.comparisons import ComparisonReader, has
from rlhf_cli.data.parsing.conversations import text_of
from rlhf_cli.data.parsing.fields import Columns, apply_columns, check_columns, mapped_columns, missing
from rlhf_cli.data.parsing.prompt_columns import omit_if_excluded, with_whole_prompt
from rlhf_cli.data.parsing.prompts import PromptReader
from rlhf_cli.data.parsing.values import NO_COMPLETION, check_completion, is_blank, reference_of
from rlhf_cli.data.readers.rows import Row
from rlhf_cli.data.records import Candidates, Demonstration, Kind, PromptRecord, Ranking, Record
from rlhf_cli.data.skips import OmitRecordError, Skip, SkipRecordError
from rlhf_cli.data.warnings import WarningLog
from rlhf_cli.errors import DataError
from rlhf_cli.settings.comparison import ComparisonSettings


class RowParser:
    """Turns the rows of one source into records of one kind.

    Args:
        kind: what the rows should be.
        columns: our field -> the file's.
        warnings: collects the warnings.
        comparison: how the user says that comparisons are read; null reads the forms that are recognized.
        keep_blank: rankings may hold empty completions: a model sampled them, and a low rank for them is a signal.
    """

    def __init__(
        self,
        kind: Kind,
        columns: Columns,
        warnings: WarningLog,
        *,
        comparison: ComparisonSettings | None = None,
        keep_blank: bool = False,
    ) -> None:
        check_columns(columns)
        self._keep_blank = keep_blank
        self._kind: Kind = kind
        self._columns, self._mapped, self._warnings = columns, mapped_columns(columns), warnings
        self._options = ImportOptions(columns, warnings, kind in ("candidates", "prompt"), comparison)
        self._rated: RatedRows | None = None
        if kind in ("preference", "ranking", "candidates"):
            self._rated = RatedRows(self._options, RowParser("demonstration", columns, WarningLog()).parse)
        self._prompts = PromptReader(warnings)
        self._comparisons = ComparisonReader(self._prompts, warnings, self._require)

    def records(self, row: Row) -> Iterator[Record | Skip]:
        """Yield the records of one row: several if it is in another tool's format; invalid ones are skipped.

        A row that holds a part of a ranking yields nothing; see `rest`.
        """
        if row.encoding != "utf-8":
            self._warnings.add("windows", row.location)
        try:
            decoded = decode_cells(row)
            if self._rated is not None and self._rated.take(decoded):
                return
            for converted in convert_row(decoded, self._kind, self._options):
                yield converted if isinstance(converted, Skip) else self._parsed(converted)
        except OmitRecordError as omitted:
            self._warnings.add(omitted.kind, row.location)
        except SkipRecordError as skip:
            yield Skip(row.location, skip.reason, row.excerpt())
        except DataError as error:
            yield Skip.of(error, row.location, row.excerpt())

    def rest(self) -> Iterator[Record | Skip]:
        """Yield the records that several rows make, once all rows were read."""
        for row in self._rated.rankings() if self._rated is not None else ():
            yield self._parsed(row)

    @property
    def why_none(self) -> str:
        """A hint for a source without records."""
        if self._rated is not None and self._rated.is_used:
            return "a ranking needs a completion that is rated better and one rated worse, of the same prompt: add some"
        return "check that this is the file you meant"

    def _parsed(self, row: Row) -> Record | Skip:
        try:
            return self.parse(row)
        except SkipRecordError as skip:
            return Skip(row.location, skip.reason, row.excerpt())
        except DataError as error:
            return Skip.of(error, row.location, row.excerpt())

    def parse(self, row: Row) -> Record:
        """Parse one record; raises `DataError` if it is wrong, else an exception of `skips` if it is not to be used."""
        row = apply_columns(row, self._columns)
        row = with_whole_prompt(row, self._mapped, self._warnings)
        if self._kind == "demonstration":
            omit_if_excluded(row)
        parse: Callable[[Row], Record] = {
            "demonstration": self._demonstration,
            "prompt": self._prompt_record,
            "preference": self._ranking,
            "ranking": self._ranking,
            "candidates": self._candidates,
        }[self._kind]
        record = parse(row)
        if isinstance(record, PromptRecord | Candidates) and (reference := reference_of(row)) is not None:
            record = replace(record, reference=reference)
        is_plain_text = isinstance(record, Demonstration) and not has(row, "prompt")
        if is_blank(record.prompt) and not is_plain_text:
            self._warnings.add("empty prompt", row.location)
        return record

    # One method per kind

    def _demonstration(self, row: Row) -> Demonstration:
        if name := _conversation_field(row):
            prompt, completion = self._prompts.split_conversation(row, name)
            if completion is None:
                raise SkipRecordError(NO_COMPLETION)
            return Demonstration(prompt, check_completion(completion), row.location)
        if "text" in row.fields and not has(row, "prompt") and not has(row, "completion"):
            self._prompts.check_style(row, "strings")
            return Demonstration("", check_completion(text_of(row, "text", row.fields["text"])), row.location)
        self._require(row, "prompt", "completion")
        prompt = self._prompts.prompt(row)
        return Demonstration(
            prompt,
            check_completion(self._prompts.reply(row, "completion", row.fields["completion"], prompt)),
            row.location,
        )

    def _prompt_record(self, row: Row) -> PromptRecord:
        if name := _conversation_field(row) if not has(row, "prompt") else None:
            messages = self._prompts.conversation(row, name)
            if messages[-1].role == "assistant":
                messages = messages[:-1]
                self._warnings.add("completion dropped", row.location)
            if not messages:
                raise row.error(f"`{name}` holds a completion only: there is no prompt", "begin with a user message")
            return PromptRecord(messages, row.location)
        if "prompt" not in row.fields and has(row, "chosen", "rejected"):  # HH has its prompts only inside its pairs
            return PromptRecord(self._ranking(row).prompt, row.location)
        if "prompt" not in row.fields and "completions" in row.fields:
            return PromptRecord(self._candidates(row).prompt, row.location)
        self._require(row, "prompt")
        return PromptRecord(self._prompts.prompt(row), row.location)

    def _ranking(self, row: Row) -> Ranking:
        expected = ("completions", "ranking") if self._kind == "ranking" else ("chosen", "rejected")
        return self._comparisons.ranking(row, keep_blank=self._keep_blank or row.may_be_blank, expected=expected)

    def _candidates(self, row: Row) -> Candidates:
        return self._comparisons.candidates(row, keep_blank=self._keep_blank or row.may_be_blank)

    def _require(self, row: Row, *names: str) -> None:
        if lacking := tuple(name for name in names if name not in row.fields):
            raise missing(row, self._kind, lacking, self._columns)


def _conversation_field(row: Row) -> str | None:
    """Name of the field with the whole conversation; a null one counts if the row has no other field for it."""
    names = [name for name in ("messages", "conversations") if name in row.fields]
    others = any(has(row, other) for other in ("prompt", "completion", "text", "chosen"))
    return next((name for name in names if has(row, name) or not others), None)
