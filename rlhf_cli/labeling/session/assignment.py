"""Assigns items to annotators and draws the order of completions. All draws are hashes, so they can be repeated."""

from __future__ import annotations

import hashlib
import random

from rlhf_cli.labeling.label_records import Purpose
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.rows import Assignment
from rlhf_cli.labeling.session.state import LabelState

LEASE_MS = 30 * 60 * 1000
"""An open task is reserved for this long after its annotator was last active; then others may get the item too."""
REPEAT_AFTER = 5
"""A hidden repeat comes at least this many tasks after the item was first shown, so that it is forgotten."""


def shown_order(seed: int, item: str, annotator: str, count: int) -> tuple[int, ...]:
    """Order in which one annotator sees an item's completions: (count,) indices, uniformly random."""
    order = list(range(count))
    _drawn(seed, "order", item, annotator.casefold()).shuffle(order)
    return tuple(order)


def repeated_order(first: tuple[int, ...]) -> tuple[int, ...]:
    """Order for a hidden repeat: reversed, so that a position bias shows."""
    return tuple(reversed(first))


def open_assignment(state: LabelState, annotator: int) -> int | None:
    """The annotator's open task: the one reopened last, otherwise the oldest that is still needed; None if none is."""
    mine = [number for number in state.of_annotator[annotator] if number not in state.standing]
    reopened = [number for number in mine if number in state.reopened and is_in_plan(state, number)]
    if reopened:
        return max(reopened, key=lambda number: state.reopened[number].id)
    return next((number for number in mine if _is_needed(state, state.assignments[number])), None)


def is_in_plan(state: LabelState, number: int) -> bool:
    """Whether the plan still contains an assignment's item, for the same purpose."""
    given = state.assignments[number]
    return given.item in (state.known if given.purpose == "gold" else state.listed)


def _is_needed(state: LabelState, given: Assignment) -> bool:
    if given.purpose != "label":
        return is_in_plan(state, given.id)
    has_work = given.id in state.drafts
    return given.item in state.listed and (has_work or given.item in state.unresolved)


def next_item(state: LabelState, annotator: int, now_ms: int) -> tuple[str, Purpose] | None:
    """The next item for an annotator without an open task, and its purpose; None if nothing is left for them."""
    ordinary = _ordinary(state, annotator, now_ms)
    if ordinary is None:
        return None
    count, name = len(state.of_annotator[annotator]), state.annotators[annotator].name.casefold()
    purpose = _purpose(state.plan, name, count)
    if purpose == "repeat":
        others = _repeatable(state, annotator)
    else:
        others = _unseen_gold(state, annotator) if purpose == "gold" else []
    return (_drawn(state.plan.seed, "which", name, count).choice(others), purpose) if others else (ordinary, "label")


def remaining_tasks(state: LabelState, annotator: int, ordinary: int) -> int:
    """Tasks left for an annotator, including the hidden repeats and gold items to come.

    The interfaces show this number. If it did not count hidden tasks, it would stand still after a repeat and give it
    away.

    Args:
        state: of the store.
        annotator: id.
        ordinary: ordinary items left for this annotator.
    """
    plan, name = state.plan, state.annotators[annotator].name.casefold()
    if not (plan.repeat_share or plan.gold_share):
        return ordinary
    mine = (state.assignments[number] for number in state.of_annotator[annotator] if number not in state.standing)
    in_hand = [given.purpose for given in mine if _is_needed(state, given)]
    ordinary -= in_hand.count("label")
    drawn = state.hidden[annotator]
    at = len(state.of_annotator[annotator])
    gold, repeats = len(_unseen_gold(state, annotator)), len(_repeatable(state, annotator, after=1)) + ordinary
    left = position = 0
    while position < ordinary:
        while len(drawn) <= at + left:
            drawn.append(_purpose(plan, name, len(drawn)))
        purpose = drawn[at + left]
        left += 1
        if purpose == "repeat" and repeats:
            repeats -= 1
        elif purpose == "gold" and gold:
            gold -= 1
        else:
            position += 1
    return left + len(in_hand)


def _purpose(plan: LabelPlan, name: str, count: int) -> Purpose:
    """Purpose of an annotator's task number `count` (from 0)."""
    if count >= REPEAT_AFTER and _share(plan.seed, "repeat", name, count) < plan.repeat_share:
        return "repeat"
    return "gold" if _share(plan.seed, "gold", name, count) < plan.gold_share else "label"


def _unseen_gold(state: LabelState, annotator: int) -> list[str]:
    return [item for item in state.known if item not in state.had[annotator]]


def _ordinary(state: LabelState, annotator: int, now_ms: int) -> str | None:
    had = state.had[annotator]
    for item in state.unresolved:
        if item in had:
            continue
        count = state.counts[item]
        # A time in the future means that the clock was set back: such a task reserves nothing.
        held = sum(0 <= now_ms - state.latest_at(number) < LEASE_MS for number in count.held.values())
        if len(count.ranked) + held < state.plan.overlap:
            return item
    return None


def _repeatable(state: LabelState, annotator: int, after: int = REPEAT_AFTER) -> list[str]:
    mine = state.of_annotator[annotator]
    found = []
    for number in mine[: max(0, len(mine) - after + 1)]:
        given, action = state.assignments[number], state.standing.get(number)
        is_ranking = given.purpose == "label" and action is not None and action.kind == "ranked"
        if is_ranking and state.had[annotator][given.item] == 1 and given.item in state.listed:
            found.append(given.item)
    return found


def _drawn(seed: int, *what: object) -> random.Random:
    return random.Random(int.from_bytes(_digest(seed, *what)[:16], "big"))


def _share(seed: int, *what: object) -> float:
    """A uniformly distributed number in [0, 1)."""
    return int.from_bytes(_digest(seed, *what)[:7], "big") / 2**56


def _digest(*what: object) -> bytes:
    return hashlib.sha256("\x1f".join(map(str, what)).encode()).digest()
