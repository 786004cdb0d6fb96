"""Labels as files of ours and of other tools: same labels, same bytes.

Rankings go out; hidden repeats, gold items and labels without a ranking do not, but for the form `labels`, which is the
whole record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, get_args

from rlhf_cli.data.records import Ranking
from rlhf_cli.labeling.exports.pairs import conversations, preferences, rewardbench
from rlhf_cli.labeling.exports.rows import Exported, ranking_to_json
from rlhf_cli.labeling.exports.tools import argilla, label_studio
from rlhf_cli.labeling.label_records import LabelRecord, to_json

Form = Literal["rankings", "labels", "preferences", "conversations", "rewardbench", "label-studio", "argilla"]
FORMS: tuple[Form, ...] = get_args(Form)


def export_labels(labels: Iterable[LabelRecord]) -> Exported:
    """Individual labels as they are, those that are no rankings, repeats and gold among them."""
    return Exported([to_json(label) for label in labels], is_array=False, lost=[])


def export_rankings(rankings: Sequence[Ranking], form: Form) -> Exported:
    """Rankings in any form but `labels`.

    Args:
        rankings: individual or merged ones.
        form: see `FORMS`.

    Raises:
        UsageError: the form has no room for conversations, and there are some.
    """
    ways: Mapping[str, Callable[[Sequence[Ranking]], Exported]] = {
        "rankings": lambda given: Exported([ranking_to_json(ranking) for ranking in given], is_array=False, lost=[]),
        "preferences": preferences,
        "conversations": conversations,
        "rewardbench": rewardbench,
        "label-studio": label_studio,
        "argilla": argilla,
    }
    return ways[form](rankings)
