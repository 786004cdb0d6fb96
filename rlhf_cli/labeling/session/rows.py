"""Rows of a label store, as dataclasses."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from rlhf_cli.data.records import Candidates, Message
from rlhf_cli.labeling.label_records import Outcome, Purpose
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.types import Entry

Kind = Literal["ranked", "skipped", "flagged", "undone"]


@dataclass(frozen=True)
class Assignment:
    """An item assigned to an annotator.

    Attributes:
        shown: (K,) indices into the item's completions, in the order this annotator sees them.
        round: 0, or 1 for a hidden repeat.
        at: time of the assignment, milliseconds since 1970.
    """

    id: int
    item: str
    annotator: int
    round: int
    purpose: Purpose
    shown: tuple[int, ...]
    at: int


@dataclass(frozen=True)
class Action:
    """A label (ranking, skip or flag), or the undo of one.

    Attributes:
        entry: for `ranked`.
        reason: for `skipped` and `flagged`.
        undoes: id of the action it undoes, for `undone`.
        plan: id of the plan that was valid.
    """

    id: int
    assignment: int
    kind: Kind
    key: str
    entry: Entry | None
    reason: str
    undoes: int | None
    plan: int
    active_ms: int
    at: int


@dataclass(frozen=True)
class DraftRow:
    """The latest draft of a task.

    Attributes:
        undo: id of the undo that had reopened the task when the draft was written; None if there was none.
    """

    entry: Entry
    undo: int | None
    active_ms: int
    at: int


@dataclass
class ItemCount:
    """Annotators of an item by what they did with it. Hidden repeats do not count.

    Attributes:
        ranked: annotators with a valid ranking.
        refused: annotators who skipped or flagged it.
        held: annotator -> assignment without a label.
    """

    ranked: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    held: dict[int, int] = field(default_factory=dict)

    @property
    def done(self) -> set[int]:
        """Annotators who labeled, skipped or flagged it."""
        return self.ranked | self.refused

    def is_resolved(self, plan: LabelPlan) -> bool:
        """Whether no further annotator is needed."""
        return len(self.ranked) >= plan.overlap or len(self.refused) >= plan.set_aside_after


def action_of(
    number: int, assignment: int, kind: str, key: str, body: str, undoes: int | None, plan: int, active: int, at: int
) -> Action:
    """Build an action from its row."""
    plain: dict[str, Any] = json.loads(body)
    entry = Entry.of(plain["entry"]) if "entry" in plain else None
    return Action(number, assignment, cast(Kind, kind), key, entry, plain.get("reason", ""), undoes, plan, active, at)


def outcome_of(action: Action) -> Outcome:
    """Outcome of a label."""
    assert action.kind != "undone"
    return action.kind


def candidates_of(prompt: str, completions: str) -> Candidates:
    """Build an item from the JSON of its row."""
    asked = json.loads(prompt)
    return Candidates(
        prompt=asked if isinstance(asked, str) else tuple(Message(turn["role"], turn["content"]) for turn in asked),
        completions=tuple(json.loads(completions)),
    )
