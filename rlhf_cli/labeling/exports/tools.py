"""Exports rankings for the labeling tools Label Studio and Argilla: one record per item, with all its rankings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_cli.data.records import Ranking, prompt_to_json
from rlhf_cli.labeling.aggregation import group_of, in_order_of
from rlhf_cli.labeling.exports.rows import Exported


def label_studio(rankings: Sequence[Ranking]) -> Exported:
    """Tasks with their annotations, for a `Ranker` named `rank` over a `List` named `answers`.

    A project has one configuration, so all rankings of a file have the same form: lists of ids or, if any ranking has
    a tie, buckets named `1`, `2`, ..., best first.
    """
    has_ties = any(len(tier) > 1 for ranking in rankings for tier in ranking.tiers)
    rows = []
    for group, members in _items(rankings):
        first = members[0]
        data: dict[str, Any] = {
            "prompt": prompt_to_json(first.prompt),
            "items": [{"id": str(number), "body": text} for number, text in enumerate(first.completions, start=1)],
        }
        annotations = [
            _annotation(f"{group}-{number}", ranking, has_ties) for number, ranking in enumerate(members, start=1)
        ]
        rows.append({"data": data, "annotations": annotations})
    return Exported(rows, is_array=True, lost=_no_margins(rankings, "Label Studio's rankings"))


def _annotation(identifier: str, ranking: Ranking, has_ties: bool) -> dict[str, Any]:
    tiers = [[str(index + 1) for index in tier] for tier in ranking.tiers]
    if has_ties:
        ranker = {str(position): tier for position, tier in enumerate(tiers, start=1)}
    else:
        ranker = {"rank": [one for tier in tiers for one in tier]}
    result = {
        "id": identifier,
        "from_name": "rank",
        "to_name": "answers",
        "type": "ranker",
        "value": {"ranker": ranker},
    }
    annotation: dict[str, Any] = {"result": [result]}
    if ranking.annotator is not None:
        annotation["completed_by"] = {"email": ranking.annotator}
    return annotation


def argilla(rankings: Sequence[Ranking]) -> Exported:
    """Records for a `RankingQuestion` named `ranking` over fields `response-1`, `response-2`, ...; equal ranks tie."""
    rows = []
    for group, members in _items(rankings):
        first = members[0]
        names = [f"response-{number}" for number in range(1, len(first.completions) + 1)]
        responses = [
            {
                "value": [
                    {"value": names[index], "rank": rank}
                    for rank, tier in enumerate(ranking.tiers, start=1)
                    for index in tier
                ],
                "user_id": ranking.annotator,
                "status": "submitted",
            }
            for ranking in members
        ]
        rows.append(
            {
                "id": group,
                "fields": {
                    "prompt": prompt_to_json(first.prompt),
                    **dict(zip(names, first.completions, strict=True)),
                },
                "metadata": {},
                "suggestions": {},
                "responses": {"ranking": responses},
                "vectors": {},
            }
        )
    return Exported(rows, is_array=True, lost=_no_margins(rankings, "Argilla's rankings"))


def _items(rankings: Iterable[Ranking]) -> list[tuple[str, list[Ranking]]]:
    """Group rankings by prompt and completions; completions are in the order of the first ranking."""
    groups: dict[str, list[Ranking]] = {}
    for ranking in rankings:
        group = groups.setdefault(group_of(ranking), [])
        group.append(in_order_of(group[0], ranking) if group else ranking)
    return list(groups.items())


def _no_margins(rankings: Iterable[Ranking], what: str) -> list[str]:
    count = sum(ranking.margin is not None for ranking in rankings)
    return [f"{count:,} margins: {what} cannot hold them"] if count else []
