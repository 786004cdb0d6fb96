"""Loads labels to measure: from a run, a store, `labels.jsonl`, or any rankings with annotators."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rlhf_cli.data.records import Ranking, prompt_key
from rlhf_cli.data.sources import read_records
from rlhf_cli.errors import DataError
from rlhf_cli.labeling.label_records import LabelRecord
from rlhf_cli.labeling.label_sources import labels_of, store_of

_KEYS_OF_A_LABEL = {"item", "outcome", "shown", "purpose"}


def labels_to_count(where: Path) -> tuple[list[LabelRecord], list[str]]:
    """All labels, and warnings about them.

    Args:
        where: run directory, store (`*.sqlite`), `labels.jsonl`, or a file of rankings or preferences with `annotator`.

    Raises:
        DataError: there are none, or none has an annotator.
    """
    if where.is_dir() and store_of(where) is None and not (where / "label" / "labels.jsonl").is_file():
        rankings = where / "label" / "rankings.jsonl"
        if rankings.is_file():
            return _from_rankings(rankings)
    if where.is_file() and where.suffix != ".sqlite" and not _holds_labels(where):
        return _from_rankings(where)
    return labels_of(where), []


def _holds_labels(file: Path) -> bool:
    """Whether the first line is a label. True for an empty file, whose error should mention labels."""
    with file.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
    if not first:
        return True
    try:
        row = json.loads(first)
    except ValueError:
        return False
    return isinstance(row, dict) and row.keys() >= _KEYS_OF_A_LABEL


def _from_rankings(file: Path) -> tuple[list[LabelRecord], list[str]]:
    loaded = read_records(str(file), "ranking", keep_blank=True)
    labels = [_label(ranking) for ranking in loaded.records if ranking.annotator is not None]
    if not labels:
        raise DataError(
            f"{file}: none of its {len(loaded.records):,} rankings has an annotator",
            hint="add `annotator` to each record; agreement is measured between annotators",
        )
    warnings = list(loaded.warnings)
    if len(labels) < len(loaded.records):
        warnings.append(
            f"{file}: {len(loaded.records) - len(labels):,} of {len(loaded.records):,} rankings have no `annotator` "
            "and are ignored"
        )
    return labels, warnings


def _label(ranking: Ranking) -> LabelRecord:
    """Convert a ranking to a label, with completions in the order of their text, since files list them in any order."""
    order = sorted(range(len(ranking.completions)), key=lambda index: (ranking.completions[index], index))
    spot = {index: position for position, index in enumerate(order)}
    completions = tuple(ranking.completions[index] for index in order)
    named = json.dumps([prompt_key(ranking.prompt), *completions], ensure_ascii=False)
    return LabelRecord(
        item=hashlib.sha256(named.encode()).hexdigest()[:16],
        prompt=ranking.prompt,
        completions=completions,
        annotator=ranking.annotator or "",
        tiers=tuple(tuple(sorted(spot[index] for index in tier)) for tier in ranking.tiers),
    )
