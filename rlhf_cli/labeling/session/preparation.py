"""Writes items, identified by the hash of their text, and plans to a store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_cli.data.records import Candidates, prompt_to_json
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.store import LabelStore
from rlhf_cli.labeling.session.types import Growth, item_id

Tiers = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class PlanItem:
    """One item of a plan.

    Attributes:
        item: id.
        is_gold: shown to check annotators, not to be labeled.
        known: the known order, as indices into the completions as stored; None if unknown.
    """

    item: str
    is_gold: bool
    known: Tiers | None


def list_items(store: LabelStore, items: Sequence[Candidates], gold: Sequence[Candidates]) -> list[PlanItem]:
    """Find or add the rows of these items. Duplicates are skipped, and so is gold that is also an item."""
    listed: dict[str, PlanItem] = {}
    for is_gold, group in ((False, items), (True, gold)):
        for item in group:
            number = item_id(item)
            if number not in listed:
                completions = _stored(store, number, item)
                listed[number] = PlanItem(number, is_gold, _by_stored(item, completions) if is_gold else None)
    return list(listed.values())


def _stored(store: LabelStore, number: str, item: Candidates) -> Sequence[str]:
    """The item's completions in stored order, which may differ from the order given here."""
    row = store.connection.execute("SELECT completions FROM items WHERE id = ?", (number,)).fetchone()
    if row is None:
        prompt, texts = json.dumps(prompt_to_json(item.prompt)), json.dumps(item.completions)
        store.insert("items", id=number, prompt=prompt, completions=texts)
    completions = item.completions if row is None else json.loads(row[0])
    if any(item.cut_off):
        tokens = dict(zip(item.completions, item.cut_off, strict=True))
        store.add_cut_off(number, [tokens[text] for text in completions])
    return completions


def _by_stored(item: Candidates, completions: Sequence[str]) -> Tiers | None:
    if item.known is None:
        return None
    spot = {text: index for index, text in enumerate(completions)}
    return tuple(tuple(sorted(spot[item.completions[index]] for index in tier)) for tier in item.known)


def write_plan(store: LabelStore, plan: LabelPlan, listed: Sequence[PlanItem], now_ms: int) -> None:
    """Add a plan. The newest plan is the valid one."""
    if plan.guidelines is not None:
        store.connection.execute(
            "INSERT INTO guidelines VALUES (?, ?) ON CONFLICT DO NOTHING", (plan.guidelines_hash, plan.guidelines)
        )
    body = {
        "overlap": plan.overlap,
        "criteria": list(plan.criteria),
        "strengths": plan.strengths,
        "repeat_share": plan.repeat_share,
        "gold_share": plan.gold_share,
        "set_aside_after": plan.set_aside_after,
        "enough": plan.enough,
        "seed": plan.seed,
    }
    number = store.insert("plans", body=json.dumps(body), guidelines=plan.guidelines_hash, at=now_ms)
    _add_listed(store, number, listed)


def grow_plan(
    store: LabelStore, plan: int, before: Sequence[PlanItem], listed: Sequence[PlanItem], growth: Growth, now_ms: int
) -> None:
    """Add the items to a plan that are not among those `before`, and how far its completions are sampled."""
    known = {row.item for row in before}
    _add_listed(store, plan, [row for row in listed if row.item not in known], len(before))
    store.add_growth(plan, growth.sampled, growth.prompts, now_ms)


def _add_listed(store: LabelStore, plan: int, listed: Sequence[PlanItem], first: int = 0) -> None:
    """Add items to a plan, at the positions from `first` on."""
    for position, row in enumerate(listed, first):
        known = None if row.known is None else json.dumps(row.known)
        store.insert("listed", plan=plan, position=position, item=row.item, is_gold=int(row.is_gold), known=known)
