"""In-memory state of a label store: assignments, labels, and what is still needed.

Every row is applied once, in the order of the file, no matter which process wrote it. Nothing here is written.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import cast

from rlhf_cli.data.records import Candidates
from rlhf_cli.labeling.label_records import Purpose
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.preparation import PlanItem, Tiers
from rlhf_cli.labeling.session.rows import Action, Assignment, DraftRow, ItemCount, action_of, candidates_of
from rlhf_cli.labeling.session.store import LabelStore
from rlhf_cli.labeling.session.types import Annotator, Entry, Growth


class LabelState:
    """State derived from a store's rows. `catch_up` reads new rows; all attributes are read-only for callers."""

    def __init__(self, store: LabelStore) -> None:
        self._store = store
        self.plan = LabelPlan()
        self.plan_id = 0
        self.guidelines: dict[int, str | None] = {}
        """Plan -> hash of its guidelines."""
        self.items: dict[str, Candidates] = {}
        self.cut_off: dict[str, tuple[int | None, ...]] = {}
        """Item -> `Candidates.cut_off` of its completions; items that have none are missing."""
        self.listed: dict[str, int] = {}
        """Item -> position in the valid plan."""
        self.growth: Growth | None = None
        """How far the completions of the valid plan are sampled; None if it has all its items."""
        self.gold: list[str] = []
        self.listing: list[PlanItem] = []
        """Rows of the valid plan, in order."""
        self.known: dict[str, Tiers] = {}
        """Gold item -> its known order."""
        self.annotators: dict[int, Annotator] = {}
        self.assignments: dict[int, Assignment] = {}
        self.of_annotator: dict[int, list[int]] = defaultdict(list)
        """Annotator -> their assignments, in order."""
        self.had: dict[int, dict[str, int]] = defaultdict(dict)
        """Annotator -> item -> number of times it was assigned to them."""
        self.standing: dict[int, Action] = {}
        """Assignment -> its valid label (one that was not undone)."""
        self.by_key: dict[str, Action] = {}
        self.stack: dict[int, list[Action]] = defaultdict(list)
        """Annotator -> their valid labels, in order."""
        self.reopened: dict[int, Action] = {}
        """Assignment -> the undo that reopened it."""
        self.taken_back: dict[int, Action] = {}
        """Assignment -> the label that was undone last."""
        self.taken_ranking: dict[int, tuple[Entry, int]] = {}
        """Assignment -> the ranking that was undone last, and the id of that undo."""
        self.hidden: dict[int, list[Purpose]] = defaultdict(list)
        """Annotator -> purposes of their tasks, as far as they have been drawn."""
        self.drafts: dict[int, DraftRow] = {}
        self.counts: dict[str, ItemCount] = defaultdict(ItemCount)
        self.unresolved: dict[str, None] = {}
        """Items of the plan that need more labels, roughly in order."""
        self.labels = self.labels_left = self.set_aside = 0
        self.open_answered: dict[int, int] = defaultdict(int)
        """Annotator -> number of unresolved items that they are done with."""
        self._last = dict.fromkeys(("annotators", "assignments", "actions", "drafts", "cut_off"), 0)

    # Reading

    def catch_up(self) -> None:
        """Apply rows added since the last call, by any process."""
        rows = self._store.connection.execute
        newest = rows("SELECT max(id) FROM plans").fetchone()[0]
        if newest is not None and newest != self.plan_id:
            self._read_plan(newest)
            self.guidelines = dict(rows("SELECT id, guidelines FROM plans"))
        found = self._store.growth(self.plan_id)
        self.growth = None if found is None else Growth(*found)
        if self.growth is not None:
            self._read_listed()
        for number, item, tokens in self._store.cut_off(self._last["cut_off"]):
            self.cut_off[item] = tokens
            self._last["cut_off"] = number
        for number, name in rows("SELECT id, name FROM annotators WHERE id > ?", (self._last["annotators"],)):
            self.annotators[number] = Annotator(number, name)
            self._last["annotators"] = number
        for row in rows("SELECT * FROM assignments WHERE id > ? ORDER BY id", (self._last["assignments"],)):
            self.add_assignment(
                Assignment(row[0], row[1], row[2], row[3], cast(Purpose, row[4]), tuple(json.loads(row[5])), row[6])
            )
        for row in rows("SELECT * FROM actions WHERE id > ? ORDER BY id", (self._last["actions"],)):
            self.add_action(action_of(*row))
        for row in rows("SELECT * FROM drafts WHERE id > ? ORDER BY id", (self._last["drafts"],)):
            self.add_draft(row[0], row[1], DraftRow(Entry.of(json.loads(row[2])), *row[3:]))

    def _read_plan(self, number: int) -> None:
        rows = self._store.connection.execute
        body, guidelines = rows(
            "SELECT body, text FROM plans LEFT JOIN guidelines ON hash = guidelines WHERE id = ?", (number,)
        ).fetchone()
        plain = json.loads(body)
        self.plan = LabelPlan(**plain | {"criteria": tuple(plain["criteria"])}, guidelines=guidelines)
        self.plan_id = number
        self.listed, self.gold, self.listing, self.known = {}, [], [], {}
        self._clear_sums()
        self._read_listed()

    def _read_listed(self) -> None:
        """Read the items of the plan that were added since the last call; positions ascend."""
        listed = self._store.connection.execute(
            "SELECT item, prompt, completions, known, position, is_gold FROM listed JOIN items ON id = item "
            "WHERE plan = ? AND position >= ? ORDER BY position",
            (self.plan_id, len(self.listing)),
        )
        for item, prompt, completions, known, position, is_gold in listed:
            self.items[item] = candidates_of(prompt, completions)
            tiers = None if known is None else tuple(tuple(tier) for tier in json.loads(known))
            self.listing.append(PlanItem(item, bool(is_gold), tiers))
            if not is_gold:
                self.listed[item] = position
                self._add(item, +1)
            else:
                self.gold.append(item)
                if tiers is not None:
                    self.known[item] = tiers

    def _clear_sums(self) -> None:
        self.unresolved = {}
        self.labels = self.labels_left = self.set_aside = 0
        self.open_answered.clear()
        self.hidden.clear()

    # Applying

    def add_assignment(self, row: Assignment) -> None:
        """Apply an assignment."""
        self._last["assignments"] = row.id
        if row.item not in self.items:  # of an earlier plan: its labels can still be read
            self._read_item(row.item)
        self.assignments[row.id] = row
        self.of_annotator[row.annotator].append(row.id)
        self.had[row.annotator][row.item] = self.had[row.annotator].get(row.item, 0) + 1
        if row.purpose == "label":
            self.counts[row.item].held[row.annotator] = row.id

    def _read_item(self, item: str) -> None:
        row = self._store.connection.execute("SELECT prompt, completions FROM items WHERE id = ?", (item,)).fetchone()
        self.items[item] = candidates_of(*row)

    def add_action(self, action: Action) -> None:
        """Apply a label or an undo."""
        self._last["actions"] = action.id
        self.by_key[action.key] = action
        given = self.assignments[action.assignment]
        counted = given.purpose == "label"
        if counted:
            self._add(given.item, -1)
        count, who = self.counts[given.item], given.annotator
        if action.kind == "undone":
            before = self.standing.pop(action.assignment)
            self.stack[who].remove(before)
            self.reopened[action.assignment] = action
            self.taken_back[action.assignment] = before
            if before.entry is not None:
                self.taken_ranking[action.assignment] = (before.entry, action.id)
            if counted:
                count.ranked.discard(who)
                count.refused.discard(who)
                count.held[who] = given.id
        else:
            self.standing[action.assignment] = action
            self.stack[who].append(action)
            if counted:
                count.held.pop(who, None)
                (count.ranked if action.kind == "ranked" else count.refused).add(who)
        if counted:
            self._add(given.item, +1)

    def add_draft(self, number: int, assignment: int, row: DraftRow) -> None:
        """Apply a draft."""
        self._last["drafts"] = number
        self.drafts[assignment] = row

    def add_annotator(self, row: Annotator) -> None:
        """Apply an annotator."""
        self._last["annotators"] = row.id
        self.annotators[row.id] = row

    def _add(self, item: str, sign: int) -> None:
        """Add what one item contributes to the sums, or subtract it before the item changes."""
        if item not in self.listed:
            return
        count = self.counts[item]
        self.labels += sign * len(count.ranked)
        if not count.is_resolved(self.plan):
            self.labels_left += sign * (self.plan.overlap - len(count.ranked))
            if sign > 0:
                self.unresolved[item] = None
            else:
                self.unresolved.pop(item, None)
            for annotator in count.done:
                self.open_answered[annotator] += sign
        elif len(count.ranked) < self.plan.overlap:
            self.set_aside += sign

    def latest_at(self, assignment: int) -> int:
        """When the annotator was last active on an assignment, milliseconds since 1970."""
        draft, undo = self.drafts.get(assignment), self.reopened.get(assignment)
        return max(self.assignments[assignment].at, draft.at if draft else 0, undo.at if undo else 0)

    def draft(self, assignment: int) -> tuple[Entry | None, int]:
        """Entry of a task without a label, and the active milliseconds spent on it."""
        draft, undo = self.drafts.get(assignment), self.reopened.get(assignment)
        if undo is None or (draft is not None and draft.undo == undo.id):
            return (None, 0) if draft is None else (draft.entry, draft.active_ms)
        entry, taken_by = self.taken_ranking.get(assignment, (None, 0))
        if draft is not None and (draft.undo or 0) >= taken_by:  # written after that ranking, for example before a skip
            entry = draft.entry
        return entry, self.taken_back[assignment].active_ms
