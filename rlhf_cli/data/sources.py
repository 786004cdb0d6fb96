"""What the rest of the package calls: records of a source, streamed, read whole, or only validated.

A source is a file, a folder of files, or a hub data set; a kind says which records it should hold. Errors (`DataError`)
name `file:line`; records that are left out are counted; what deserves a warning is returned, never printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from rlhf_cli.data.checks import (
    CandidateChecks,
    PromptSet,
    RankingChecks,
    distinct_candidates,
    latest_annotations,
    overlap_warning,
)
from rlhf_cli.data.hub import HubSource
from rlhf_cli.data.origins import resolve, rows_of, source_digest
from rlhf_cli.data.parsing import RowParser
from rlhf_cli.data.records import Candidates, Kind, Ranking, Record
from rlhf_cli.data.skips import Skip, SkipLog
from rlhf_cli.data.warnings import Remarks
from rlhf_cli.errors import DataError

__all__ = [
    "LoadedRecords",
    "Skip",
    "SkipLog",
    "ValidationReport",
    "is_hub",
    "iter_records",
    "overlap_warning",
    "read_records",
    "source_digest",
    "validate_source",
]

_NONE: Mapping[str, str] = MappingProxyType({})
_SKIPS_KEPT = 1_000


@dataclass(frozen=True)
class LoadedRecords:
    """All records of a source.

    Attributes:
        records: in the order of the source.
        skips: those left out; stages add what does not fit their model.
        warnings: one line each, for `progress.warn`.
        total: records seen, those left out included.
    """

    records: list
    skips: SkipLog
    warnings: list[str]
    total: int


@dataclass(frozen=True)
class ValidationReport:
    """What a source holds, found out without keeping it.

    Attributes:
        records: that can be used.
        skips: counts by reason, and the first 1,000 of them.
        warnings: one line each, what will be left out among them.
        prompts: hashes of all prompts, for `overlap_warning`.
    """

    records: int
    skips: SkipLog
    warnings: list[str]
    prompts: PromptSet


def is_hub(source: str) -> bool:
    """Whether a source is a data set of the hub rather than something local; raises `DataError` if it is neither."""
    return isinstance(resolve(source), HubSource)


def iter_records(
    source: str,
    kind: Kind,
    *,
    columns: Mapping[str, str] = _NONE,
    on_skip: Callable[[Skip], None],
    remarks: Remarks | None = None,
    keep_blank: bool = False,
) -> Iterator[Record]:
    """Records one by one, in memory bounded by the longest of them.

    Args:
        source: file, folder or hub data set.
        kind: "preference" and "ranking" both yield `Ranking`, from either form of file; "candidates" yields
            `Candidates`, from these and from answers that nobody ranked.
        columns: our field -> the file's.
        on_skip: is told of each record left out.
        remarks: collects what deserves a warning.
        keep_blank: lists of K answers may hold empty ones, as a model's own answers do.

    Raises:
        DataError: the source cannot be read, a record is wrong, or there is none.
        UsageError: `columns` names a field that no record has.
    """
    said = Remarks() if remarks is None else remarks
    parser = RowParser(kind, columns, said, keep_blank=keep_blank)
    count = 0
    for row in rows_of(source):
        for record in parser.records(row):
            count += 1
            if isinstance(record, Skip):
                on_skip(record)
            else:
                yield record
    if not count:
        left_out = "".join(f"; {line}" for line in said.warnings(source))
        raise DataError(
            f"{source}: holds nothing that can be used{left_out}", hint="check that this is the file you meant"
        )


def read_records(
    source: str,
    kind: Kind,
    *,
    columns: Mapping[str, str] = _NONE,
    max_skip: float = 0.01,
    keep_blank: bool = False,
) -> LoadedRecords:
    """All records, see `iter_records`.

    Of rankings of the same completions by one annotator only the latest is kept, of the same candidates the first.

    Raises:
        DataError: as `iter_records`, or more than `max_skip` of the records are left out.
    """
    skips, remarks, checks = SkipLog(), Remarks(), _checks(kind)
    records = list(
        iter_records(source, kind, columns=columns, on_skip=skips.add, remarks=remarks, keep_blank=keep_blank)
    )
    total = len(records) + skips.total
    skips.check(total, max_skip, source)
    for record in records:
        _check(checks, record)
    if checks.repeats and isinstance(checks, CandidateChecks):
        records = distinct_candidates(cast(list[Candidates], records))
    elif checks.repeats:
        records = latest_annotations(cast(list[Ranking], records))
    return LoadedRecords(records, skips, remarks.warnings(source) + checks.warnings(source), total)


def validate_source(
    source: str,
    kind: Kind,
    *,
    columns: Mapping[str, str] = _NONE,
    max_skip: float = 0.01,
    keep_blank: bool = False,
) -> ValidationReport:
    """Read a source through and keep nothing but hashes: eight bytes a prompt and a ranked pair.

    Raises:
        DataError: as `read_records`.
    """
    skips, remarks, checks, prompts = SkipLog(keep=_SKIPS_KEPT), Remarks(), _checks(kind), PromptSet()
    count = 0
    for record in iter_records(
        source, kind, columns=columns, on_skip=skips.add, remarks=remarks, keep_blank=keep_blank
    ):
        count += 1
        prompts.add(record)
        _check(checks, record)
    skips.check(count + skips.total, max_skip, source)
    warnings = skips.warnings(count + skips.total, source) + remarks.warnings(source) + checks.warnings(source)
    return ValidationReport(count - checks.repeats, skips, warnings, prompts)


def _checks(kind: Kind) -> RankingChecks | CandidateChecks:
    return CandidateChecks() if kind == "candidates" else RankingChecks()


def _check(checks: RankingChecks | CandidateChecks, record: Record) -> None:
    """Take in a record of the sort that is checked; others pass."""
    if isinstance(checks, CandidateChecks):
        assert isinstance(record, Candidates)
        checks.add(record)
    elif isinstance(record, Ranking):
        checks.add(record)
