"""Who gets which item next, and in which order its answers are shown: drawn from hashes, so that it can be repeated."""

from __future__ import annotations

import hashlib
import random

from rlhf_cli.labeling.label_records import Purpose
from rlhf_cli.labeling.session.state import Assignment, LabelState
from rlhf_cli.labeling.session.types import LabelPlan

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
    reopened = [number for number in mine if number in state.reopened and is_asked(state, number)]
    if reopened:
        return max(reopened, key=lambda number: state.reopened[number].id)
    return next((number for number in mine if _is_of_use(state, state.assignments[number])), None)


def is_asked(state: LabelState, number: int) -> bool:
    """Whether the plan still has an assignment's item, for what it was given out for."""
    given = state.assignments[number]
    return given.item in (state.known if given.purpose == "gold" else state.listed)


def _is_of_use(state: LabelState, given: Assignment) -> bool:
    if given.purpose != "label":
        return is_asked(state, given.id)
    has_work = given.id in state.drafts
    return given.item in state.listed and (has_work or given.item in state.unresolved)


def choose(state: LabelState, annotator: int, now_ms: int) -> tuple[str, Purpose] | None:
    """The next item for a person who has none in hand, and what for; None if nothing is left for them."""
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


def left_with_hidden(state: LabelState, annotator: int, ordinary: int) -> int:
    """Tasks left for a person who has so many ordinary ones left, with the repeats and gold items to come.

    Faces show this figure. One that stood still after a repeat would give away which tasks are repeats.
    """
    plan, name = state.plan, state.annotators[annotator].name.casefold()
    if not (plan.repeat_share or plan.gold_share):
        return ordinary
    mine = (state.assignments[number] for number in state.of_annotator[annotator] if number not in state.standing)
    in_hand = [given.purpose for given in mine if _is_of_use(state, given)]
    ordinary -= in_hand.count("label")
    drawn = state.hidden[annotator]
    at = len(state.of_annotator[annotator])
    gold, repeats = len(_unseen_gold(state, annotator)), len(_repeatable(state, annotator, after=1)) + ordinary
    left = place = 0
    while place < ordinary:
        while len(drawn) <= at + left:
            drawn.append(_purpose(plan, name, len(drawn)))
        purpose = drawn[at + left]
        left += 1
        if purpose == "repeat" and repeats:
            repeats -= 1
        elif purpose == "gold" and gold:
            gold -= 1
        else:
            place += 1
    return left + len(in_hand)


def _purpose(plan: LabelPlan, name: str, count: int) -> Purpose:
    """What a person's task number `count` (from 0) is for."""
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
        # A time in the future says that the clock was set back; nobody is kept waiting for it to come.
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
    """A number from 0 to 1, each as likely."""
    return int.from_bytes(_digest(seed, *what)[:7], "big") / 2**56


def _digest(*what: object) -> bytes:
    return hashlib.sha256("\x1f".join(map(str, what)).encode()).digest()
