"""Where labels are: in the store of a run directory, in a store of their own, or in an exported file."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli.errors import DataError
from rlhf_cli.labeling.label_records import LabelRecord, read_labels
from rlhf_cli.labeling.session import LabelSession

STORE = Path("kept") / "label" / "labels.sqlite"
"""Inside a run directory."""


def store_of(where: Path) -> Path | None:
    """The label store that a run directory holds or that a path is; None where there is none."""
    if where.is_dir():
        return store if (store := where / STORE).is_file() else None
    return where if where.suffix == ".sqlite" and where.is_file() else None


def labels_of(where: Path) -> list[LabelRecord]:
    """All individual labels of a run directory, a store (`*.sqlite`) or a `labels.jsonl`.

    Raises:
        DataError: there are none.
    """
    if (store := store_of(where)) is not None:
        session = LabelSession(store, create=False)
        try:
            return session.labels()
        finally:
            session.close()
    file = where / "label" / "labels.jsonl" if where.is_dir() else where
    if not file.is_file():
        raise DataError(
            f"{where}: no labels are there",
            hint="name a run directory whose `label` is by people, its labels.sqlite, or a labels.jsonl",
        )
    return list(read_labels(file))
