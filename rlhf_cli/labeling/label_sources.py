"""Finds labels: in a finished stage of a run, in the store of a labeling session, or in an exported file."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

from rlhf_cli.errors import DataError
from rlhf_cli.labeling.label_records import LabelRecord, read_labels
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.progress import warn

STORE = Path("kept") / "label" / "labels.sqlite"
"""Path of the label store, relative to the run directory."""
_BEGAN = ".label.began.json"


def store_of(where: Path) -> Path | None:
    """The store to read labels from: the file itself, or the store of a run that waits for labels; None otherwise."""
    if where.is_dir():
        return where / STORE if waits_for_people(where) else None
    return where if where.suffix == ".sqlite" and where.is_file() else None


def waits_for_people(run_dir: Path) -> bool:
    """Whether the `label` stage of a run has begun, uses human annotators, and is not finished."""
    if not (run_dir / STORE).is_file():
        return False
    if not (run_dir / "label").is_dir():
        return True
    try:  # a finished stage that has begun again, for example with another overlap
        began = json.loads((run_dir / _BEGAN).read_bytes())
        return began["identity"]["settings"]["label.by"] == "human"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def labels_of(where: Path) -> list[LabelRecord]:
    """All individual labels of a run directory, a store (`*.sqlite`) or a `labels.jsonl`.

    For a finished stage these are the labels it finished with; a warning reports later ones.

    Raises:
        DataError: there are none.
    """
    if (store := store_of(where)) is not None:
        return _in_store(store)
    file = where / "label" / "labels.jsonl" if where.is_dir() else where
    if not file.is_file():
        raise DataError(
            f"{where}: no labels found",
            hint="name a run directory with `label.by: human`, its labels.sqlite, or a labels.jsonl",
        )
    labels = list(read_labels(file))
    if not labels:
        raise DataError(f"{file} is empty", hint="check the command that wrote it")
    if where.is_dir() and (where / STORE).is_file():
        _warn_of_later(where, labels)
    return labels


def _in_store(store: Path) -> list[LabelRecord]:
    with closing(LabelSession(store, read_only=True)) as session:
        return session.labels()


def _warn_of_later(run_dir: Path, finished: list[LabelRecord]) -> None:
    known = {(label.item, label.annotator, label.purpose, label.outcome, label.tiers) for label in finished}
    now = {
        (label.item, label.annotator, label.purpose, label.outcome, label.tiers) for label in _in_store(run_dir / STORE)
    }
    if now - known and {label.item for label in finished} & {item for item, *_ in now}:
        warn(
            f"{len(now - known):,} labels in {run_dir / STORE} are newer than the finished `label` stage; "
            "`rlhf run RECIPE --force label` uses them"
        )
