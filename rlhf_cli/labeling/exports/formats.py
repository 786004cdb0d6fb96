"""Exports labels to our formats and to those of other tools. The output is deterministic.

Hidden repeats, gold items and labels without a ranking are exported in the format `labels` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, get_args

from rlhf_cli.data.records import Ranking
from rlhf_cli.labeling.exports.pairs import conversations, preferences, rewardbench
from rlhf_cli.labeling.exports.rows import Exported, ranking_to_json
from rlhf_cli.labeling.exports.tools import argilla, label_studio
from rlhf_cli.labeling.label_records import LabelRecord, to_json

ExportFormat = Literal["rankings", "labels", "preferences", "conversations", "rewardbench", "label-studio", "argilla"]
FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)


def export_labels(labels: Iterable[LabelRecord]) -> Exported:
    """Individual labels, including skips, flags, hidden repeats and gold."""
    return Exported([to_json(label) for label in labels], is_array=False, lost=[])


def export_rankings(rankings: Sequence[Ranking], format_: ExportFormat) -> Exported:
    """Rankings in any format except `labels`.

    Args:
        rankings: individual or aggregated.
        format_: see `FORMATS`.

    Raises:
        UsageError: the format cannot hold conversations, and a prompt is one.
    """
    exporters: Mapping[str, Callable[[Sequence[Ranking]], Exported]] = {
        "rankings": lambda given: Exported([ranking_to_json(ranking) for ranking in given], is_array=False, lost=[]),
        "preferences": preferences,
        "conversations": conversations,
        "rewardbench": rewardbench,
        "label-studio": label_studio,
        "argilla": argilla,
    }
    return exporters[format_](rankings)
