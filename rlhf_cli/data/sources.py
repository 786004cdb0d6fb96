"""Records of a source: streamed, read whole, or only validated. The other packages read data through this module.

A source is a file, a folder of files, or a hub data set; the kind says which records it must hold. Errors (`DataError`)
name `file:line`; skipped records are counted; warnings are returned, never printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

from rlhf_cli.data.checks import (
    CandidateChecks,
    PromptKeys,
    RankingChecks,
    distinct_candidates,
    latest_annotations,
)
from rlhf_cli.data.parsing.fields import NO_COLUMNS, Columns
from rlhf_cli.data.readers.hub import HubSource
from rlhf_cli.data.readers.resolve import resolve, rows_of, source_digest
from rlhf_cli.data.records import Candidates, Kind, Ranking, Record
from rlhf_cli.data.row_parser import RowParser
from rlhf_cli.data.skips import Skip, SkipLog
from rlhf_cli.data.warnings import WarningLog
from rlhf_cli.errors import DataError
from rlhf_cli.settings.comparison import ComparisonSettings

__all__ = [
    "LoadedRecords",
    "Skip",
    "SkipLog",
    "ValidationReport",
    "is_hub",
    "iter_records",
    "read_records",
    "source_digest",
    "validate_source",
]

_SKIPS_KEPT = 1_000
_INVALID_AT_MOST = 1_000
"""Records at the beginning of a source that may all be invalid before reading ends: the file is then another one."""


@dataclass(frozen=True)
class LoadedRecords:
    """All records of a source.

    Attributes:
        records: in the order of the source.
        skips: the skipped records; stages add those that do not fit their model.
        warnings: one line each, for `progress.warn`.
        total: number of records read, skipped ones included.
    """

    records: list
    skips: SkipLog
    warnings: list[str]
    total: int


@dataclass(frozen=True)
class ValidationReport:
    """What a source holds, found without keeping its records.

    Attributes:
        records: number of records that can be used.
        skips: counts by reason, and the first 1,000 skipped records.
        warnings: one line each, with one about the skipped records.
        prompts: keys of all prompts.
    """

    records: int
    skips: SkipLog
    warnings: list[str]
    prompts: PromptKeys


def is_hub(source: str) -> bool:
    """Whether a source is a data set of the hub, not a local path; raises `DataError` if it is neither."""
    return isinstance(resolve(source), HubSource)


def iter_records(
    source: str,
    kind: Kind,
    *,
    columns: Columns = NO_COLUMNS,
    comparison: ComparisonSettings | None = None,
    on_skip: Callable[[Skip], None],
    warnings: WarningLog | None = None,
    keep_blank: bool = False,
) -> Iterator[Record]:
    """Yield records one by one, in memory bounded by the longest of them; rated completions are put together first.

    Args:
        source: file, folder or hub data set.
        kind: "preference" and "ranking" both yield `Ranking`, from both formats; "candidates" yields `Candidates`,
            from these formats and from unranked completions.
        columns: our field -> the file's, or several of the file's.
        comparison: completion columns and a verdict; None reads the forms that are recognized.
        on_skip: called with each skipped record, invalid ones included.
        warnings: collects the warnings.
        keep_blank: keep blank completions in lists of K completions, as a model may have sampled them.

    Raises:
        DataError: the source cannot be read, all of its first records are invalid, or there is no record.
        UsageError: `columns` names a field that records do not have.
    """
    warnings = WarningLog() if warnings is None else warnings
    parser = RowParser(kind, columns, warnings, comparison=comparison, keep_blank=keep_blank)
    count = valid = 0
    for record in _records(parser, source):
        count += 1
        if not isinstance(record, Skip):
            valid += 1
            yield record
            continue
        if record.error is not None and count >= _INVALID_AT_MOST and not valid:
            raise record.error
        on_skip(record)
    if not count:
        skipped = "".join(f"; {line}" for line in warnings.lines(source))
        raise DataError(f"{source}: no usable records{skipped}", hint=parser.why_none)


def _records(parser: RowParser, source: str) -> Iterator[Record | Skip]:
    for row in rows_of(source):
        yield from parser.records(row)
    yield from parser.rest()


def read_records(
    source: str,
    kind: Kind,
    *,
    columns: Columns = NO_COLUMNS,
    comparison: ComparisonSettings | None = None,
    max_skip: float = 0.01,
    keep_blank: bool = False,
) -> LoadedRecords:
    """Read all records; see `iter_records` for the arguments.

    If one annotator ranked the same completions several times, only the latest ranking is kept; of equal candidates
    the first.

    Raises:
        DataError: as `iter_records`, or more than `max_skip` of the records are skipped.
    """
    skips, warnings, checks = SkipLog(), WarningLog(), _checks(kind)
    records = list(
        iter_records(
            source,
            kind,
            columns=columns,
            comparison=comparison,
            on_skip=skips.add,
            warnings=warnings,
            keep_blank=keep_blank,
        )
    )
    total = len(records) + skips.total
    skips.check(total, max_skip, source)
    for record in records:
        _check(checks, record)
    checks.report(warnings)
    if checks.repeats and isinstance(checks, CandidateChecks):
        records = distinct_candidates(cast(list[Candidates], records))
    elif checks.repeats:
        records = latest_annotations(cast(list[Ranking], records))
    return LoadedRecords(records, skips, warnings.lines(source), total)


def validate_source(
    source: str,
    kind: Kind,
    *,
    columns: Columns = NO_COLUMNS,
    comparison: ComparisonSettings | None = None,
    max_skip: float = 0.01,
    keep_blank: bool = False,
) -> ValidationReport:
    """Read a source and keep only hashes: eight bytes per prompt and per ranked pair.

    Raises:
        DataError: as `read_records`.
    """
    skips, warnings, checks, prompts = SkipLog(keep=_SKIPS_KEPT), WarningLog(), _checks(kind), PromptKeys()
    count = 0
    for record in iter_records(
        source,
        kind,
        columns=columns,
        comparison=comparison,
        on_skip=skips.add,
        warnings=warnings,
        keep_blank=keep_blank,
    ):
        count += 1
        prompts.add(record)
        _check(checks, record)
    total = count + skips.total
    skips.check(total, max_skip, source)
    checks.report(warnings)
    lines = skips.warnings(total, source) + warnings.lines(source)
    return ValidationReport(count - checks.repeats, skips, lines, prompts)


def _checks(kind: Kind) -> RankingChecks | CandidateChecks:
    return CandidateChecks() if kind == "candidates" else RankingChecks()


def _check(checks: RankingChecks | CandidateChecks, record: Record) -> None:
    """Add a record if these checks are about its kind."""
    if isinstance(checks, CandidateChecks):
        assert isinstance(record, Candidates)
        checks.add(record)
    elif isinstance(record, Ranking):
        checks.add(record)
