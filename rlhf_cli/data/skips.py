"""Skipped records: counted by reason and written to a file; too many of them end the run."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_cli.errors import DataError

INVALID = "invalid record"


class SkipRecordError(Exception):
    """A record that is skipped and counted; the user sees no error."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class OmitRecordError(Exception):
    """A record that the file itself excludes, such as one marked as bad; it is counted, and does not count as skipped.

    Args:
        kind: of the warning, see `warnings`.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(frozen=True)
class Skip:
    """One skipped record.

    Attributes:
        location: `file:line`.
        reason: short, and equal for all records skipped for the same reason, since skips are counted by it.
        excerpt: beginning of the record, so that a reader recognizes it.
        error: what is wrong with an invalid record, and how to fix it; None for other skips.
    """

    location: str
    reason: str
    excerpt: str
    error: DataError | None = field(default=None, compare=False)

    @classmethod
    def of(cls, error: DataError, location: str, excerpt: str) -> Skip:
        """The skip of an invalid record."""
        return cls(location, INVALID, excerpt, error)

    def to_json(self) -> dict[str, str]:
        """Return it as plain data."""
        plain = {"location": self.location, "reason": self.reason, "excerpt": self.excerpt}
        return plain if self.error is None else plain | {"error": self.error.message}


class SkipLog:
    """All skipped records of one source.

    Args:
        keep: how many are kept with their location; all are counted. None keeps all.
    """

    def __init__(self, keep: int | None = None) -> None:
        self._keep = keep
        self._first_error: DataError | None = None
        self._skips: list[Skip] = []
        self._counts: Counter[str] = Counter()

    def add(self, skip: Skip) -> None:
        """Count a skipped record."""
        self._counts[skip.reason] += 1
        self._first_error = self._first_error or skip.error
        if self._keep is None or len(self._skips) < self._keep:
            self._skips.append(skip)

    @property
    def counts(self) -> dict[str, int]:
        """Reason -> number of records, the most frequent reason first."""
        return dict(self._counts.most_common())

    @property
    def total(self) -> int:
        """Number of skipped records."""
        return self._counts.total()

    def __iter__(self):
        return iter(self._skips)

    def __len__(self) -> int:
        return self.total

    def write(self, path: Path) -> None:
        """Write the kept skips as JSON lines: `location`, `reason`, `excerpt`, and `error` of an invalid record."""
        with path.open("w", encoding="utf-8") as file:
            for skip in self._skips:
                file.write(json.dumps(skip.to_json(), ensure_ascii=False) + "\n")

    def _reasons(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.counts.items())

    def warnings(self, total: int, source: str) -> list[str]:
        """One line about the skipped records; empty if there are none.

        Args:
            total: number of records read, skipped ones included.
            source: for the message.
        """
        if not self.total:
            return []
        verb = "is" if self.total == 1 else "are"
        line = (
            f"{source}: {self.total:,} of {total:,} records {verb} skipped: {self._reasons()} "
            f"(first: {self._skips[0].location})"
        )
        return [line if self._first_error is None else f"{line}; the first invalid one: {self._first_error.message}"]

    def check(self, total: int, max_skip: float, source: str, *, fix: str = "fix the records") -> None:
        """Raise `DataError` if all records are skipped, or too many of them: that of the first invalid one, if any.

        Args:
            total: number of records read, skipped ones included.
            max_skip: largest share that may be skipped.
            source: for the message.
            fix: what to do about records that are valid but skipped, for the hint.
        """
        if not self.total or (self.total < total and self.total <= max_skip * total):
            return
        if self._first_error is not None:
            raise self._with_count(self._first_error, total, max_skip)
        reasons, first = self._reasons(), f"; the first is {self._skips[0].location}" if self._skips else ""
        share = self.total / total
        if self.total >= total:
            raise DataError(
                f"{source}: none of its {total:,} records can be used ({reasons}){first}",
                hint=f"{fix}, or check that this is the file you meant",
            )
        raise DataError(
            f"{source}: {self.total:,} of {total:,} records ({share:.2%}) would be skipped, more than "
            f"`data.max_skip: {max_skip:g}` ({reasons}){first}",
            hint=f"{fix}, or allow more with `--set data.max_skip={_round_up(share):g}`",
        )

    def _with_count(self, error: DataError, total: int, max_skip: float) -> DataError:
        """The error of the first invalid record, with how many are skipped if it is not the only one."""
        if self.total == 1 or self.total >= total:
            return error
        return DataError(
            f"{error.message}; {self.total:,} of {total:,} records would be skipped ({self._reasons()}), more than "
            f"`data.max_skip: {max_skip:g}`",
            hint=error.hint,
        )


def _round_up(share: float) -> float:
    """The share, rounded up to whole percent."""
    return min(1.0, (int(share * 100) + 1) / 100)
