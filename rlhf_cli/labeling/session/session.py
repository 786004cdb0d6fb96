"""A labeling session, independent of its user interface: assigns items, takes labels, and stores both.

The terminal and the web page call the same methods. Everything a method returns is on disk: a `Receipt` survives
`kill -9`. A label that is sent twice, for example after a lost reply, is stored once: the client gives each a key.
"""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf_cli.data.records import Candidates
from rlhf_cli.labeling.label_records import LabelRecord, Purpose
from rlhf_cli.labeling.session.assignment import (
    is_in_plan,
    next_item,
    open_assignment,
    repeated_order,
    shown_order,
)
from rlhf_cli.labeling.session.export import labels_of_state
from rlhf_cli.labeling.session.lookups import checked_active_ms, own_assignment, receipt_of_same, scoped_key, task_of
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.preparation import grow_plan, list_items, write_plan
from rlhf_cli.labeling.session.progress import overview_of, progress_of
from rlhf_cli.labeling.session.rows import Action, Assignment, DraftRow, Kind
from rlhf_cli.labeling.session.state import LabelState
from rlhf_cli.labeling.session.transactions import TransactionalState
from rlhf_cli.labeling.session.types import (
    MAX_NAME,
    MAX_REASON,
    Annotator,
    AnnotatorOverview,
    Entry,
    Growth,
    InvalidLabelError,
    LabelConflictError,
    LabelTask,
    PlanChangedError,
    Receipt,
    SessionProgress,
    check_text,
)
from rlhf_cli.plain_text import printable

_NEW_DRAFT_MS = 10_000
"""An unchanged draft is written again only if its active time has grown by this much."""


class LabelSession:
    """Items, annotators and labels of one store. May be called from several threads.

    Args:
        path: file of the store.
        create: create the file if it does not exist.
        read_only: open for reading only; needs no write permission and waits for no lock.
        clock: seconds since 1970.

    Raises:
        DataError, UsageError, DiskError: as `LabelStore`.
    """

    def __init__(
        self,
        path: Path,
        *,
        create: bool = True,
        read_only: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._db = TransactionalState(path, create=create, read_only=read_only, clock=clock)

    def close(self) -> None:
        """Close the file of the store."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Group calls: one write to disk for many labels, on disk when the block ends.

        An error that leaves the block rolls all of its calls back; a refused label that is caught inside does not.
        """
        with self._db.writing():
            yield

    # Setup

    def prepare(self, plan: LabelPlan, items: Sequence[Candidates], gold: Sequence[Candidates] = ()) -> None:
        """Set what is to be labeled, and how. Does nothing if both are set already; existing labels are kept.

        Args:
            plan: how to label.
            items: what to label, in the order of assignment; two or more completions each.
            gold: items with a `known` order, mixed in; gold items that are also in `items` are skipped.
        """
        with self._db.writing() as state:
            listed = list_items(self._db.store, items, gold)
            if not state.plan_id or state.growth is not None or (state.plan, state.listing) != (plan, listed):
                write_plan(self._db.store, plan, listed, self._db.now())
                state.catch_up()

    def begin_growth(
        self, plan: LabelPlan, items: Sequence[Candidates], gold: Sequence[Candidates] = (), *, growth: Growth
    ) -> None:
        """Let people label while completions are sampled: `grow` adds items, and `prepare` ends it with all of them.

        An earlier growth with the same plan goes on, if all of its items are among these.

        Args:
            plan: how to label.
            items: those that are there, in the order of assignment.
            gold: see `prepare`.
            growth: how far sampling is.
        """
        with self._db.writing() as state:
            listed = list_items(self._db.store, items, gold)
            if state.growth is None or state.plan != plan or not set(state.listing) <= set(listed):
                write_plan(self._db.store, plan, listed, self._db.now())
                state.catch_up()  # the plan to which the growth belongs
            grow_plan(self._db.store, state.plan_id, state.listing, listed, growth, self._db.now())
            state.catch_up()

    def grow(self, items: Sequence[Candidates], growth: Growth) -> None:
        """Add items that were sampled, in the order of assignment; after `begin_growth`."""
        with self._db.writing() as state:
            listed = list_items(self._db.store, items, ())
            grow_plan(self._db.store, state.plan_id, state.listing, listed, growth, self._db.now())
            state.catch_up()

    @property
    def plan(self) -> LabelPlan:
        """How the items are labeled."""
        with self._db.reading() as state:
            return state.plan

    def annotator(self, name: str) -> Annotator:
        """Return the annotator of this name, and create a new one if needed. Names ignore case.

        Raises:
            InvalidLabelError: the name is empty, too long, or has control characters.
        """
        name = " ".join(unicodedata.normalize("NFC", name).split())
        if not name or len(name) > MAX_NAME or printable(name) != name or not name.isprintable():
            raise InvalidLabelError(
                f"`{printable(name)[:MAX_NAME]}` is not a valid name", hint=f"use 1 to {MAX_NAME} printable characters"
            )
        with self._db.writing() as state:
            for known in state.annotators.values():
                if known.name.casefold() == name.casefold():
                    return known
            made = Annotator(self._db.store.insert("annotators", name=name, at=self._db.now()), name)
            state.add_annotator(made)
            return made

    def annotators(self) -> list[Annotator]:
        """All annotators, in the order in which they were created."""
        with self._db.reading() as state:
            return list(state.annotators.values())

    # Labeling

    def next(self, annotator: int) -> LabelTask | None:
        """The annotator's open task, or a new one; None if nothing is left for this annotator now."""
        with self._db.writing() as state:
            number = open_assignment(state, annotator)
            if number is not None:
                return task_of(state, number)
            found = next_item(state, annotator, self._db.now())
            return None if found is None else task_of(state, self._assign(state, annotator, *found))

    def _assign(self, state: LabelState, annotator: int, item: str, purpose: Purpose) -> int:
        before = state.had[annotator].get(item, 0)
        if before:
            first = next(n for n in state.of_annotator[annotator] if state.assignments[n].item == item)
            shown = repeated_order(state.assignments[first].shown)
        else:
            name = state.annotators[annotator].name
            shown = shown_order(state.plan.seed, item, name, len(state.items[item].completions))
        values = {"item": item, "annotator": annotator, "round": before, "purpose": purpose, "at": self._db.now()}
        number = self._db.store.insert("assignments", shown=json.dumps(shown), **values)
        state.add_assignment(Assignment(id=number, shown=shown, **values))
        return number

    def task(self, annotator: int, task: int) -> LabelTask:
        """A task of this annotator; raises `UnknownTaskError`."""
        with self._db.reading() as state:
            return task_of(state, own_assignment(state, annotator, task).id)

    def save_draft(self, annotator: int, task: int, entry: Entry, *, active_seconds: float) -> None:
        """Store an unfinished entry. Does nothing if the task has a label already.

        Raises:
            UnknownTaskError: see `submit`.
            InvalidLabelError: no valid label could begin with this draft.
        """
        with self._db.writing() as state:
            given = own_assignment(state, annotator, task)
            state.plan.check_draft(entry, len(given.shown))
            if task in state.standing:
                return
            active, now = checked_active_ms(given, active_seconds, self._db.now()), self._db.now()
            before, spent = state.draft(task)
            if before == entry and abs(active - spent) < _NEW_DRAFT_MS:
                return
            reopened = state.reopened.get(task)
            row = DraftRow(entry, None if reopened is None else reopened.id, active, now)
            number = self._db.store.insert(
                "drafts", assignment=task, body=entry.to_json(), undo=row.undo, active_ms=active, at=now
            )
            state.add_draft(number, task, row)

    def submit(
        self, annotator: int, task: int, entry: Entry, *, key: str, active_seconds: float, plan: str | None = None
    ) -> Receipt:
        """Store a ranking.

        Args:
            annotator: id.
            task: id.
            entry: a complete entry, by shown positions.
            key: chosen by the client, new for each label, and the same when the label is sent again.
            active_seconds: time spent on this task, earlier visits included, breaks excluded.
            plan: `LabelTask.plan` of what the interface displayed; None if it displayed no guidelines or criteria, as
                in a script.

        Raises:
            PlanChangedError: the plan has changed since.
            InvalidLabelError: the entry is incomplete; says what is missing.
            LabelConflictError: the task has another label, or the key was used for another label.
            UnknownTaskError: the annotator has no such task.
        """
        with self._db.writing() as state:
            given = own_assignment(state, annotator, task)
            if (known := receipt_of_same(state, given, "ranked", entry, "", key)) is not None:
                return known
            if plan not in (None, state.plan.display_hash):
                raise PlanChangedError(
                    "the instructions have changed in the meantime", hint="read the guidelines and criteria again"
                )
            state.plan.check(entry, len(given.shown))
            return self._store_label(state, given, "ranked", entry, "", key, active_seconds)

    def skip(self, annotator: int, task: int, *, key: str, active_seconds: float, reason: str = "") -> Receipt:
        """Skip a task. After `LabelPlan.set_aside_after` skips and flags the item is set aside. See `submit`."""
        with self._db.writing() as state:
            given = own_assignment(state, annotator, task)
            check_text(reason, "the reason", MAX_REASON)
            return self._store_label(state, given, "skipped", None, reason, key, active_seconds)

    def flag(self, annotator: int, task: int, *, key: str, active_seconds: float, reason: str) -> Receipt:
        """Report a problem with a task, with a reason; see `submit`."""
        with self._db.writing() as state:
            given = own_assignment(state, annotator, task)
            if not reason.strip():
                raise InvalidLabelError("a flag needs a reason", hint="describe what is wrong with the task")
            check_text(reason, "the reason", MAX_REASON)
            return self._store_label(state, given, "flagged", None, reason, key, active_seconds)

    def undo(self, annotator: int, *, key: str) -> LabelTask | None:
        """Undo this annotator's latest label; the task is open again, with the label as its draft.

        Labels of items that are no longer in the plan are not undone.

        Returns:
            The task; None if there is nothing to undo.
        """
        with self._db.writing() as state:
            if (known := state.by_key.get(scoped_key(annotator, key))) is not None:
                if known.kind != "undone":
                    raise LabelConflictError("this key was used for a label")
                return task_of(state, known.assignment)
            labels = state.stack[annotator]
            last = next((action for action in reversed(labels) if is_in_plan(state, action.assignment)), None)
            if last is None:
                return None
            given = state.assignments[last.assignment]
            self._insert_action(state, given, "undone", key, last.active_ms, undoes=last.id)
            return task_of(state, given.id)

    def _store_label(
        self,
        state: LabelState,
        given: Assignment,
        kind: Kind,
        entry: Entry | None,
        reason: str,
        key: str,
        active_seconds: float,
    ) -> Receipt:
        if (known := receipt_of_same(state, given, kind, entry, reason, key)) is not None:
            return known
        active = checked_active_ms(given, active_seconds, self._db.now())
        action = self._insert_action(state, given, kind, key, active, entry=entry, reason=reason)
        return Receipt(action.id, given.id, is_new=True)

    def _insert_action(
        self,
        state: LabelState,
        given: Assignment,
        kind: Kind,
        key: str,
        active_ms: int,
        *,
        entry: Entry | None = None,
        reason: str = "",
        undoes: int | None = None,
    ) -> Action:
        key, now, plan = scoped_key(given.annotator, key), self._db.now(), state.plan_id
        parts = [f'"entry": {entry.to_json()}'] if entry is not None else []
        parts += [f'"reason": {json.dumps(reason)}'] if reason else []
        number = self._db.store.insert(
            "actions",
            assignment=given.id,
            kind=kind,
            key=key,
            body=f"{{{', '.join(parts)}}}",
            undoes=undoes,
            plan=plan,
            active_ms=active_ms,
            at=now,
        )
        action = Action(number, given.id, kind, key, entry, reason, undoes, plan, active_ms, now)
        state.add_action(action)
        return action

    # Reading

    def progress(self, annotator: int | None = None) -> SessionProgress:
        """Progress of the session, and of one annotator if given."""
        with self._db.reading() as state:
            return progress_of(state, annotator)

    def overview(self) -> list[AnnotatorOverview]:
        """Work of each annotator so far, in the order in which they were created."""
        with self._db.reading() as state:
            return overview_of(state)

    def labels(self) -> list[LabelRecord]:
        """All valid labels of the items in the plan: by item, annotator's name and round."""
        with self._db.reading() as state:
            return labels_of_state(state)
