"""Data sets of the Hugging Face hub: `org/name`, `org/name:config`, `@revision`, `#split`, in this order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_cli.console import interactive
from rlhf_cli.data.readers.rows import Row
from rlhf_cli.errors import DataError

_NAME = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<config>[^:@#]+))?(@(?P<revision>[^:@#]+))?(#(?P<split>[^@#]+))?"
)


@dataclass(frozen=True)
class HubSource:
    """A data set of the hub, or part of it."""

    id: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, text: str) -> HubSource | None:
        """Parse a name; None if it is not the name of a hub data set."""
        found = _NAME.fullmatch(text)
        if found is None:
            return None
        return cls(found["id"], found["config"], found["revision"], found["split"] or "train")

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.id}{config}{revision}#{self.split}"


def hub_rows(source: HubSource) -> Iterator[Row]:
    """Yield the rows of a hub data set, numbered `row N` from 1, memory-mapped from the cache on disk.

    `datasets` runs no code of a data set (since its version 4).
    """
    import datasets
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    if not interactive():
        datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(source.id, source.config, revision=source.revision, split=source.split)
    except (DatasetsError, OSError, ValueError, pa.ArrowException) as error:
        raise _failed(source, error) from error
    if not len(loaded):
        raise DataError(f"{source}: no records")
    for number, fields in enumerate(loaded, start=1):
        yield Row(f"{source}:row {number}", dict(fields))


def _failed(source: HubSource, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    offline = isinstance(error, ConnectionError) or "offline" in reason.lower()
    return DataError(
        f"{source}: the data set cannot be loaded from the hub: {reason}",
        hint="the hub cannot be reached: use a local file or folder instead"
        if offline
        else "write `org/name`, then `:config`, `@revision` and `#split` if needed; a local path must exist",
    )
