"""How a set of items is to be labeled, and which labels are valid under it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from rlhf_cli.labeling.session.types import (
    COMPLETION_LETTERS,
    MARK_RANGE,
    MAX_NOTE,
    Entry,
    InvalidLabelError,
    check_text,
)
from rlhf_cli.plain_text import printable


@dataclass(frozen=True)
class LabelPlan:
    """How a set of items is to be labeled; see `HumanSettings` in stages/label/settings.py.

    Attributes:
        overlap: labels needed per item.
        criteria: names of the marks each completion gets.
        strengths: ask how much better the better of two completions is.
        repeat_share: of hidden repeats.
        gold_share: of gold items.
        set_aside_after: number of annotators whose skips or flags set an item aside.
        enough: share of the items that must be done before the pipeline continues.
        seed: of the order of completions, hidden repeats and gold.
        guidelines: text; None if there are none.
    """

    overlap: int = 1
    criteria: tuple[str, ...] = ()
    strengths: bool = False
    repeat_share: float = 0.0
    gold_share: float = 0.0
    set_aside_after: int = 1
    enough: float = 1.0
    seed: int = 0
    guidelines: str | None = None

    @property
    def guidelines_hash(self) -> str | None:
        """SHA-256 of the guidelines."""
        return None if self.guidelines is None else hashlib.sha256(self.guidelines.encode()).hexdigest()

    @cached_property
    def display_hash(self) -> str:
        """Hash of what an interface displays of this plan: guidelines, criteria and whether strengths are asked for."""
        text = json.dumps([self.guidelines, self.criteria, self.strengths])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, entry: Entry, count: int) -> None:
        """Raise `InvalidLabelError` unless an entry is a complete label of `count` completions."""
        placed = [position for tier in entry.tiers for position in tier]
        names = COMPLETION_LETTERS
        if outside := [position for position in placed if not 0 <= position < count]:
            raise InvalidLabelError(f"answer number {outside[0]} does not exist; there are {count}")
        if doubled := sorted({position for position in placed if placed.count(position) > 1}):
            raise InvalidLabelError(f"answer {names[doubled[0]]} has two places", hint="give each answer one place")
        if lacking := [names[position] for position in range(count) if position not in placed]:
            which = f"answer {lacking[0]} has" if len(lacking) == 1 else f"answers {', '.join(lacking)} have"
            raise InvalidLabelError(f"{which} no place yet", hint="rank all of them; ties are allowed")
        if not all(entry.tiers):
            raise InvalidLabelError("a tier is empty", hint="remove empty tiers")
        self._check_strength(entry, count)
        self._check_marks(entry, count)
        check_text(entry.note, "the note", MAX_NOTE)

    def check_draft(self, entry: Entry, count: int) -> None:
        """Raise `InvalidLabelError` if no valid label could begin with this draft; it may be incomplete."""
        low, high = MARK_RANGE
        placed = [position for tier in entry.tiers for position in tier]
        if len(set(placed)) < len(placed) or not all(0 <= position < count for position in placed):
            raise InvalidLabelError(f"the draft must place each of {count} answers at most once")
        if entry.strength is not None and not (self.strengths and 1 <= entry.strength <= 4):
            raise InvalidLabelError(f"the draft has an invalid strength: {entry.strength}")
        for criterion, marks in entry.marks.items():
            if criterion not in self.criteria or len(marks) > count:
                raise InvalidLabelError(f"the draft has unexpected marks for `{printable(criterion)[:30]}`")
            if not all(mark is None or low <= mark <= high for mark in marks):
                raise InvalidLabelError(f"the draft has a mark that is not from {low} to {high}")
        check_text(entry.note, "the note", MAX_NOTE)

    def _check_strength(self, entry: Entry, count: int) -> None:
        asked = self.strengths and count == 2 and len(entry.tiers) == 2
        if asked and (entry.strength is None or not 1 <= entry.strength <= 4):
            raise InvalidLabelError("how much better is it?", hint="1 (negligibly, unsure) to 4 (significantly)")
        if not asked and entry.strength is not None:
            raise InvalidLabelError("unexpected strength", hint="omit it for ties, and if it is not asked for")

    def _check_marks(self, entry: Entry, count: int) -> None:
        low, high = MARK_RANGE
        if unknown := sorted(set(entry.marks) - set(self.criteria)):
            raise InvalidLabelError(f"unknown criterion `{unknown[0]}`", hint=f"the criteria are {self.criteria}")
        for criterion in self.criteria:
            marks = entry.marks.get(criterion, ())
            for position in range(count):
                mark = marks[position] if position < len(marks) else None
                if mark is None or not low <= mark <= high:
                    name = COMPLETION_LETTERS[position]
                    raise InvalidLabelError(f"answer {name} needs a mark for `{criterion}`", hint=f"{low} to {high}")
            if len(marks) > count:
                raise InvalidLabelError(f"`{criterion}` has {len(marks)} marks for {count} answers")
