"""A labeling session without a face: hands out items, takes answers, and keeps all of it.

The terminal and the page call the same methods. What a method returns is on disk: a `Receipt` outlives `kill -9`. An
answer that is sent twice, as after a lost reply, is stored once (the client gives each a key of its own).
"""

from __future__ import annotations

import json
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf_cli.data.records import Candidates
from rlhf_cli.labeling.label_records import LabelRecord, Purpose
from rlhf_cli.labeling.session.assignment import choose, is_asked, open_assignment, repeated_order, shown_order
from rlhf_cli.labeling.session.export import labels_of_state
from rlhf_cli.labeling.session.preparation import list_items, write_plan
from rlhf_cli.labeling.session.progress import overview_of, progress_of
from rlhf_cli.labeling.session.state import Action, Assignment, DraftRow, Kind, LabelState
from rlhf_cli.labeling.session.store import LabelStore
from rlhf_cli.labeling.session.types import (
    MAX_NAME,
    MAX_REASON,
    Annotator,
    AnnotatorOverview,
    Entry,
    InvalidLabelError,
    LabelConflictError,
    LabelPlan,
    PlanChangedError,
    Progress,
    Receipt,
    Task,
    UnknownTaskError,
    check_text,
)
from rlhf_cli.progress import printable

_MAX_KEY = 100
_NEW_DRAFT_MS = 10_000
"""The same draft again is worth a row when so much more time was spent on it."""


class LabelSession:
    """Items, people and answers over one store. May be called from several threads.

    Args:
        path: the store's file.
        create: make it where there is none.
        read_only: only look: needs no permission to write and waits for nobody.
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
        self._store = LabelStore(path, create=create, read_only=read_only)
        self._clock = clock
        self._lock = threading.RLock()
        self._state = LabelState(self._store)
        self._seen: int | None = None

    def close(self) -> None:
        """Close the store's file."""
        with self._lock:
            self._store.close()

    # Setting up

    def prepare(self, plan: LabelPlan, items: Sequence[Candidates], gold: Sequence[Candidates] = ()) -> None:
        """Say what is to be labeled, and how; does nothing where that is so already. Labels given before stay.

        Args:
            plan: how.
            items: what, in the order of handing out; two or more answers each.
            gold: items whose order is `known`, shown among the others; those that are items too are left out.
        """
        with self.together():
            listed = list_items(self._store, items, gold)
            if not self._state.plan_id or (self._state.plan, self._state.listing) != (plan, listed):
                write_plan(self._store, plan, listed, self._now())
                self._state.catch_up()

    @property
    def plan(self) -> LabelPlan:
        """How the items are to be labeled."""
        with self._reading():
            return self._state.plan

    def annotator(self, name: str) -> Annotator:
        """The person of this name, new or known; upper and lower case are the same person.

        Raises:
            InvalidLabelError: no name: empty, too long, or with control characters.
        """
        name = " ".join(unicodedata.normalize("NFC", name).split())
        if not name or len(name) > MAX_NAME or printable(name) != name or not name.isprintable():
            raise InvalidLabelError(f"`{printable(name)[:MAX_NAME]}` is no name", hint=f"1 to {MAX_NAME} characters")
        with self.together():
            for known in self._state.annotators.values():
                if known.name.casefold() == name.casefold():
                    return known
            made = Annotator(self._store.insert("annotators", name=name, at=self._now()), name)
            self._state.add_annotator(made)
            return made

    def annotators(self) -> list[Annotator]:
        """Everybody, in order of their coming."""
        with self._reading():
            return list(self._state.annotators.values())

    # Labeling

    def next(self, annotator: int) -> Task | None:
        """What this person is to label: the task in hand, or a new one; None if nothing is left for them now."""
        with self.together():
            number = open_assignment(self._state, annotator)
            if number is not None:
                return self._task(number)
            chosen = choose(self._state, annotator, self._now())
            return None if chosen is None else self._task(self._assign(annotator, *chosen))

    def _assign(self, annotator: int, item: str, purpose: Purpose) -> int:
        state = self._state
        before = state.had[annotator].get(item, 0)
        if before:
            first = next(n for n in state.of_annotator[annotator] if state.assignments[n].item == item)
            shown = repeated_order(state.assignments[first].shown)
        else:
            name = state.annotators[annotator].name
            shown = shown_order(state.plan.seed, item, name, len(state.items[item].completions))
        values = {"item": item, "annotator": annotator, "round": before, "purpose": purpose, "at": self._now()}
        number = self._store.insert("assignments", shown=json.dumps(shown), **values)
        state.add_assignment(Assignment(id=number, shown=shown, **values))
        return number

    def task(self, annotator: int, task: int) -> Task:
        """A task of this person again; raises `UnknownTaskError`."""
        with self._reading():
            return self._task(self._own(annotator, task).id)

    def _task(self, number: int) -> Task:
        state = self._state
        given = state.assignments[number]
        item = state.items[given.item]
        entry, active_ms = state.draft(number)
        return Task(
            id=number,
            number=state.of_annotator[given.annotator].index(number) + 1,
            prompt=item.prompt,
            answers=tuple(item.completions[index] for index in given.shown),
            plan=state.plan.shown,
            draft=entry,
            active_seconds=active_ms / 1000,
        )

    def save_draft(self, annotator: int, task: int, entry: Entry, *, active_seconds: float) -> None:
        """Keep what was entered so far, finished or not; a task that has its answer takes no more drafts.

        Raises:
            UnknownTaskError: see `submit`.
            InvalidLabelError: a draft that no label could begin with.
        """
        with self.together():
            given = self._own(annotator, task)
            self._state.plan.check_draft(entry, len(given.shown))
            if task in self._state.standing:
                return
            active, now = self._active_ms(given, active_seconds), self._now()
            before, spent = self._state.draft(task)
            if before == entry and abs(active - spent) < _NEW_DRAFT_MS:
                return
            reopened = self._state.reopened.get(task)
            row = DraftRow(entry, None if reopened is None else reopened.id, active, now)
            number = self._store.insert(
                "drafts", assignment=task, body=entry.to_json(), undo=row.undo, active_ms=active, at=now
            )
            self._state.add_draft(number, task, row)

    def submit(
        self, annotator: int, task: int, entry: Entry, *, key: str, active_seconds: float, plan: str | None = None
    ) -> Receipt:
        """Take a ranking.

        Args:
            annotator: whose.
            task: which.
            entry: by shown positions; whole.
            key: of the client's own, new for each answer and the same when it is sent again.
            active_seconds: that the person was at this task, earlier visits included, breaks left out.
            plan: `Task.plan` of what the face showed; None where nobody saw guidelines or criteria, as in a script.

        Raises:
            PlanChangedError: the plan is another one by now.
            InvalidLabelError: the entry is not whole; says what lacks.
            LabelConflictError: the task has another answer; or the key was used for another answer.
            UnknownTaskError: no such task of this person.
        """
        with self.together():
            given = self._own(annotator, task)
            known = self._known(given, "ranked", entry, "", key)
            if known is not None:
                return known
            if plan not in (None, self._state.plan.shown):
                raise PlanChangedError(
                    "what is asked of labelers has changed meanwhile", hint="look at the guidelines and criteria again"
                )
            self._state.plan.check(entry, len(given.shown))
            return self._answer(given, "ranked", entry, "", key, active_seconds)

    def skip(self, annotator: int, task: int, *, key: str, active_seconds: float, reason: str = "") -> Receipt:
        """Leave a task out; after `LabelPlan.set_aside_after` people did, nobody is asked. See `submit`."""
        with self.together():
            given = self._own(annotator, task)
            check_text(reason, "the reason", MAX_REASON)
            return self._answer(given, "skipped", None, reason, key, active_seconds)

    def flag(self, annotator: int, task: int, *, key: str, active_seconds: float, reason: str) -> Receipt:
        """Report that something is wrong with a task, in words; see `submit`."""
        with self.together():
            given = self._own(annotator, task)
            if not reason.strip():
                raise InvalidLabelError("what is wrong with it?", hint="a flag needs a reason")
            check_text(reason, "the reason", MAX_REASON)
            return self._answer(given, "flagged", None, reason, key, active_seconds)

    def _answer(
        self, given: Assignment, kind: Kind, entry: Entry | None, reason: str, key: str, active_seconds: float
    ) -> Receipt:
        known = self._known(given, kind, entry, reason, key)
        if known is not None:
            return known
        active = self._active_ms(given, active_seconds)
        return Receipt(self._act(given, kind, key, active, entry=entry, reason=reason).id, given.id, is_new=True)

    def _known(self, given: Assignment, kind: Kind, entry: Entry | None, reason: str, key: str) -> Receipt | None:
        """The receipt of an answer that stands and is given again; raises `LabelConflictError` where another stands."""
        standing = self._state.standing.get(given.id)
        used = self._state.by_key.get(self._key(given.annotator, key))
        if used is not None and used is not standing:
            what = "this answer was taken back" if used.assignment == given.id else "this key was used before"
            raise LabelConflictError(what, hint="give the answer again, as a new one")
        if standing is None:
            return None
        if (standing.kind, standing.entry, standing.reason) != (kind, entry, reason):
            raise LabelConflictError(
                "this task has another answer already", hint="take the earlier answer back first (undo)"
            )
        return Receipt(standing.id, given.id, is_new=False)

    def undo(self, annotator: int, *, key: str) -> Task | None:
        """Take this person's last answer that stands back; their task is open again, with it as a draft.

        Answers to items that the plan has no longer stay as they are.

        Returns:
            The task; None where there is nothing to take back.
        """
        with self.together():
            if (known := self._state.by_key.get(self._key(annotator, key))) is not None:
                if known.kind != "undone":
                    raise LabelConflictError("this key was used for an answer")
                return self._task(known.assignment)
            standing = self._state.stack[annotator]
            last = next((action for action in reversed(standing) if is_asked(self._state, action.assignment)), None)
            if last is None:
                return None
            given = self._state.assignments[last.assignment]
            self._act(given, "undone", key, last.active_ms, undoes=last.id)
            return self._task(given.id)

    def _act(
        self,
        given: Assignment,
        kind: Kind,
        key: str,
        active_ms: int,
        *,
        entry: Entry | None = None,
        reason: str = "",
        undoes: int | None = None,
    ) -> Action:
        key, now, plan = self._key(given.annotator, key), self._now(), self._state.plan_id
        parts = [f'"entry": {entry.to_json()}'] if entry is not None else []
        parts += [f'"reason": {json.dumps(reason)}'] if reason else []
        number = self._store.insert(
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
        self._state.add_action(action)
        return action

    def _own(self, annotator: int, task: int) -> Assignment:
        given = self._state.assignments.get(task)
        if given is None or given.annotator != annotator:
            raise UnknownTaskError(f"task {task} is not one of yours", hint="load the next one")
        return given

    def _key(self, annotator: int, key: str) -> str:
        if not key or len(key) > _MAX_KEY or not key.isascii() or not key.isprintable():
            raise InvalidLabelError("an answer without a proper key", hint=f"1 to {_MAX_KEY} ASCII characters")
        return f"{annotator}:{key}"

    def _active_ms(self, given: Assignment, seconds: float) -> int:
        """Nobody can have been at a task for longer than they have had it, whatever their clock says."""
        if not seconds >= 0.0:
            raise InvalidLabelError(f"active time is {seconds} s", hint="give seconds, 0 or more")
        milliseconds, passed = round(min(seconds, 1e9) * 1000), self._now() - given.at
        return min(milliseconds, passed) if passed >= 0 else milliseconds  # a clock that was set back proves nothing

    # Looking

    def progress(self, annotator: int | None = None) -> Progress:
        """How far all is, and one person."""
        with self._reading():
            return progress_of(self._state, annotator)

    def overview(self) -> list[AnnotatorOverview]:
        """Everybody's work so far, in order of their coming."""
        with self._reading():
            return overview_of(self._state)

    def labels(self) -> list[LabelRecord]:
        """All answers that stand, to the items of the plan: by item, annotator's name and round."""
        with self._reading():
            return labels_of_state(self._state)

    # Transactions

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is called inside is one transaction: one write to disk for many answers, on disk when the block ends.

        An error that leaves the block takes all of it back; a refused label that is caught inside harms no other.
        """
        with self._lock:
            if self._store.is_writing:
                yield
                return
            try:
                with self._store.writing():
                    self._refresh()
                    yield
            except BaseException:
                if self._store.has_written:  # memory is ahead of the file
                    self._state, self._seen = LabelState(self._store), None
                raise

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock:
            if not self._store.is_writing and self._store.version() != self._seen:
                with self._store.reading():  # all tables of one moment
                    self._refresh()
            yield

    def _refresh(self) -> None:
        version = self._store.version()
        if version != self._seen:
            self._state.catch_up()
            self._seen = version

    def _now(self) -> int:
        return round(self._clock() * 1000)
