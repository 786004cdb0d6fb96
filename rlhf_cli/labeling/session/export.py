"""Converts the state of a store to `LabelRecord`s: shown positions become indices into the item's completions."""

from __future__ import annotations

from datetime import UTC, datetime

from rlhf_cli.labeling.label_records import LabelRecord
from rlhf_cli.labeling.session.rows import Action, Assignment, outcome_of
from rlhf_cli.labeling.session.state import LabelState


def labels_of_state(state: LabelState) -> list[LabelRecord]:
    """Valid labels of the plan's items and gold: by item, annotator's name and round."""
    spot = dict(state.listed) | {item: len(state.listing) + number for number, item in enumerate(state.gold)}
    given = [
        (state.assignments[number], action)
        for number, action in state.standing.items()
        if state.assignments[number].item in spot
    ]
    given.sort(key=lambda row: (spot[row[0].item], state.annotators[row[0].annotator].name, row[0].round))
    return [_record(state, assignment, action) for assignment, action in given]


def _record(state: LabelState, given: Assignment, action: Action) -> LabelRecord:
    item, entry = state.items[given.item], action.entry
    count = len(given.shown)
    marks = {}
    if entry is not None:
        for criterion, values in entry.marks.items():
            of_completion = {given.shown[position]: mark for position, mark in enumerate(values)}
            marks[criterion] = tuple(of_completion[index] for index in range(count))
    return LabelRecord(
        item=given.item,
        prompt=item.prompt,
        completions=item.completions,
        annotator=state.annotators[given.annotator].name,
        outcome=outcome_of(action),
        tiers=()
        if entry is None
        else tuple(tuple(sorted(given.shown[position] for position in tier)) for tier in entry.tiers),
        shown=given.shown,
        purpose=given.purpose,
        known=state.known.get(given.item) if given.purpose == "gold" else None,
        strength=None if entry is None else entry.strength,
        marks=marks,
        note="" if entry is None else entry.note,
        reason=action.reason,
        active_seconds=action.active_ms / 1000,
        at=datetime.fromtimestamp(action.at / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        guidelines=state.guidelines[action.plan],
    )
