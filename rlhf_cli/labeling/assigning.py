"""Who gets which item next, and in which order its answers are shown: drawn from hashes, so that it can be repeated."""

from __future__ import annotations

import hashlib
import random

from rlhf_cli.labeling.label_records import Purpose
from rlhf_cli.labeling.state import Assignment, LabelState

LEASE_MS = 30 * 60 * 1000
"""An item that somebody has in hand is kept for them so long after they were last seen; then others may have it too."""
REPEAT_AFTER = 5
"""A hidden repeat comes at least so many tasks after its first showing, when people have forgotten it."""


def shown_order(seed: int, item: str, annotator: str, count: int) -> tuple[int, ...]:
    """Order in which one person sees an item's answers: (count,) indices, each order as likely as any other."""
    order = list(range(count))
    _drawn(seed, "order", item, annotator.casefold()).shuffle(order)
    return tuple(order)


def repeated_order(first: tuple[int, ...]) -> tuple[int, ...]:
    """Another order for a hidden repeat: the reverse, so that a habit of choosing by place shows itself."""
    return tuple(reversed(first))


def open_assignment(state: LabelState, annotator: int) -> int | None:
    """The task this person has in hand: what was reopened last, else the oldest that is still of use."""
    mine = [number for number in state.of_annotator[annotator] if number not in state.standing]
    reopened = [number for number in mine if number in state.reopened]
    if reopened:
        return max(reopened, key=lambda number: state.reopened[number].id)
    return next((number for number in mine if _is_of_use(state, state.assignments[number])), None)


def _is_of_use(state: LabelState, given: Assignment) -> bool:
    if given.purpose != "label":
        return given.item in state.listed or given.item in state.gold
    has_work = given.id in state.drafts
    return given.item in state.listed and (has_work or given.item in state.unresolved)


def choose(state: LabelState, annotator: int, now_ms: int) -> tuple[str, Purpose] | None:
    """The next item for a person who has none in hand, and what for; None if nothing is left for them."""
    ordinary = _ordinary(state, annotator, now_ms)
    if ordinary is None:
        return None
    plan, count = state.plan, len(state.of_annotator[annotator])
    name = state.annotators[annotator].name.casefold()
    if _drawn(plan.seed, "repeat", name, count).random() < plan.repeat_share:
        repeatable = _repeatable(state, annotator)
        if repeatable:
            return _drawn(plan.seed, "which", name, count).choice(repeatable), "repeat"
    if _drawn(plan.seed, "gold", name, count).random() < plan.gold_share:
        unseen = [item for item in state.gold if item not in state.had[annotator]]
        if unseen:
            return _drawn(plan.seed, "which gold", name, count).choice(unseen), "gold"
    return ordinary, "label"


def _ordinary(state: LabelState, annotator: int, now_ms: int) -> str | None:
    had = state.had[annotator]
    for item in state.unresolved:
        if item in had:
            continue
        count = state.counts[item]
        held = sum(now_ms - state.latest_at(number) < LEASE_MS for number in count.held.values())
        if len(count.ranked) + held < state.plan.overlap:
            return item
    return None


def _repeatable(state: LabelState, annotator: int) -> list[str]:
    mine = state.of_annotator[annotator]
    found = []
    for number in mine[: max(0, len(mine) - REPEAT_AFTER + 1)]:
        given, action = state.assignments[number], state.standing.get(number)
        is_ranking = given.purpose == "label" and action is not None and action.kind == "ranked"
        if is_ranking and state.had[annotator][given.item] == 1 and given.item in state.listed:
            found.append(given.item)
    return found


def _drawn(seed: int, *what: object) -> random.Random:
    digest = hashlib.sha256("\x1f".join(map(str, (seed, *what))).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))
