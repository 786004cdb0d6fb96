"""Connects keys and session: executes effects, saves drafts, and measures active time."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rlhf_cli.errors import RLHFError
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.progress import tasks_note
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import (
    Annotator,
    Entry,
    InvalidLabelError,
    LabelConflictError,
    LabelTask,
    PlanChangedError,
    SamplerStatus,
    UnknownTaskError,
)
from rlhf_cli.labeling.terminal.key_bindings import step
from rlhf_cli.labeling.terminal.keys import Key
from rlhf_cli.labeling.terminal.state import (
    Effect,
    Failure,
    ScrollArea,
    State,
    hinted,
    warned,
    with_failure,
    with_plan,
    with_task,
)

LONGEST_PAUSE = 60.0
"""A longer pause between two keys counts as this many seconds."""
DRAFT_SECONDS = 2.0
"""Interval between saved drafts, in seconds."""
RETRY_SECONDS = 30.0
"""Seconds until a failed draft is saved again; a locked store would block the keyboard each time."""

LOOK_SECONDS = 1.0
"""Interval between two looks for new completions, in seconds."""

PLAN_CHANGED = "the instructions have changed"


@dataclass
class VisitCounts:
    """Labels given in this visit; undone labels are subtracted."""

    ranked: int = 0
    skipped: int = 0
    flagged: int = 0
    undone: int = 0
    active_seconds: float = 0.0


class Controller:
    """Runs one annotator's tasks.

    Args:
        session: may be shared with other interfaces.
        annotator: who labels.
        clock: monotonic seconds.
        sampler: what may be sampling meanwhile; None if nothing is.
    """

    def __init__(
        self,
        session: LabelSession,
        annotator: Annotator,
        clock: Callable[[], float] = time.monotonic,
        sampler: SamplerStatus | None = None,
    ) -> None:
        self._session, self._who, self._clock = session, annotator.id, clock
        self._sampler = sampler or SamplerStatus(lambda: False)
        self._look = clock()
        self.state = State(session.plan, annotator.name, view="end")
        self.counts = VisitCounts()
        self.is_draft_kept = True
        self._kept = Entry()
        self._due = clock()
        self._active = self._active_kept = 0.0
        self._seen = clock()
        self._key: tuple[Any, str] = (None, "")
        self._given: dict[int, str] = {}
        self._passed: dict[int, Entry] = {}
        """Entries of skipped or flagged tasks, restored by undo."""

    # Events

    def begin(self) -> None:
        """Fetch the first task."""
        self._do(Effect("next"))
        task = self.state.task
        is_resumed = task is not None and task.draft is not None and task.draft != Entry()
        if is_resumed and self.state.view == "rank":
            self.state = replace(self.state, hint="resumed your draft", hint_style="good")
        elif task is not None and not self.state.progress.mine and not is_resumed:
            if self.state.plan.guidelines:  # show them before the first label
                self.state = replace(self.state, view="help", before="rank")
            elif not self.state.hint:
                self.state = hinted(self.state, tasks_note(self.state.progress, self.state.plan))

    def pressed(self, key: Key, scroll_area: ScrollArea) -> Effect | None:
        """Handle a key; returns effects for the terminal: quit, suspend, redraw."""
        self._count_time()
        self.state, effect = step(self.state, key, scroll_area)
        return None if effect is None else self._do(effect)

    def woken(self) -> None:
        """Continue after a suspension, which does not count as active time."""
        self._seen = self._clock()

    @property
    def wait(self) -> float | None:
        """Seconds until `tick` has something to do; None if nothing."""
        due = [self._due] if self._has_changed else []
        if self.state.progress.growth is not None:
            due.append(self._look)
        return max(0.0, min(due) - self._clock()) if due else None

    @property
    def has_failed(self) -> bool:
        """Whether sampling ended with an error, so that the visit ends."""
        return self._sampler.has_failed.is_set()

    def tick(self) -> None:
        """Save the draft if it is due, and look for new completions."""
        if self.state.progress.growth is not None and self._clock() >= self._look:
            self._look_for_more()
        if self._has_changed and self._clock() >= self._due:
            error = self._keep()
            if error is not None:
                self.state = warned(self.state, f"the draft is not saved yet: {error.message}")

    def _look_for_more(self) -> None:
        before = self.state.progress
        try:
            self._see_progress()
        except RLHFError as error:
            self.state = warned(self.state, f"the progress of sampling cannot be read: {error.message}")
        if self.state.view == "end" and self.state.progress != before:
            self._do(Effect("next"))

    def _see_progress(self) -> None:
        self._look = self._clock() + LOOK_SECONDS
        is_running = self._sampler.is_running()  # before the progress: what it sampled last is in there
        progress = self._session.progress(self._who)
        self.state = replace(self.state, progress=progress, is_sampling=is_running)

    def keep(self) -> RLHFError | None:
        """Save the draft and the active time now; returns the error, if any."""
        if self._has_changed or self._active - self._active_kept >= 1.0:
            return self._keep()
        return None

    # Effects

    def _do(self, effect: Effect) -> Effect | None:
        if effect.kind in ("leave", "redraw"):
            return effect
        try:
            return self._done(effect)
        except (LabelConflictError, UnknownTaskError) as error:
            return self._overtaken(effect, error)
        except PlanChangedError:
            self._show_plan()
            return None
        except RLHFError as error:
            self.state = with_failure(self.state, Failure(error.message, error.hint or "", effect))
            return None

    def _done(self, effect: Effect) -> Effect | None:
        if effect.kind in ("quit", "suspend", "undo"):
            error = self.keep()
            if error is not None and effect.kind != "suspend":
                raise error
        if effect.kind in ("quit", "suspend"):
            return effect
        if effect.kind == "undo":
            self._undo(effect)
        elif effect.kind == "next":
            self._load(self._session.next(self._who))
        else:
            self._reply(effect)
        return None

    def _reply(self, effect: Effect) -> None:
        assert self.state.task is not None
        task, seconds = self.state.task.id, self._active
        key = self._key_for((task, effect))
        if effect.kind == "submit":
            shown = self.state.plan.display_hash
            self._session.submit(self._who, task, effect.entry, key=key, active_seconds=seconds, plan=shown)
        else:
            self._passed[task] = self.state.entry
            if effect.kind == "skip":
                self._session.skip(self._who, task, key=key, active_seconds=seconds)
            else:
                self._session.flag(self._who, task, key=key, active_seconds=seconds, reason=effect.reason)
        self._given[task] = effect.kind
        self._count(effect.kind, +1)
        said = {"submit": "kept", "skip": "skipped", "flag": "flagged"}[effect.kind]
        self._forget(f"{said}; u undoes it")
        self._do(Effect("next"))

    def _count(self, kind: str, by: int) -> None:
        self.counts.ranked += by * (kind == "submit")
        self.counts.skipped += by * (kind == "skip")
        self.counts.flagged += by * (kind == "flag")

    def _forget(self, hint: str) -> None:
        """Clear the labeled task, so that nothing of it is saved again even if the next one cannot be loaded."""
        self.state = with_task(self.state, None, hint)
        self._kept, self._active, self._active_kept = self.state.entry, 0.0, 0.0

    def _undo(self, effect: Effect) -> None:
        task = self._session.undo(self._who, key=self._key_for((effect, self.state.progress.mine)))
        self._key = (None, "")
        if task is None:
            self.state = replace(self.state, hint="this is your first task: there is nothing to undo")
            return
        self.counts.undone += 1
        if task.id in self._given:
            self._count(self._given.pop(task.id), -1)
        if task.draft is None and task.id in self._passed:
            task = replace(task, draft=self._passed[task.id])
        before = self.state.plan
        self._load(task)
        said = "this label was undone: change it, and Enter submits it again"
        self.state = warned(self.state, said if self.state.plan == before else f"{PLAN_CHANGED}; {said}")

    def _show_plan(self) -> None:
        # Keeps the entry as far as the new plan allows.
        before, plan = self.state.plan, self._session.plan
        self.state = with_plan(self.state, plan)
        self._say_changed(before)

    def _say_changed(self, before: LabelPlan) -> None:
        self.state, now = warned(self.state, PLAN_CHANGED), self.state.plan
        if now.guidelines is not None and now.guidelines != before.guidelines:
            self.state = replace(self.state, view="help", before="rank", help_top=0)

    def _load(self, task: LabelTask | None) -> None:
        before = self.state.plan
        if task is not None and task.plan != before.display_hash:
            self.state = replace(self.state, plan=self._session.plan)
        self._see_progress()
        self.state = with_task(self.state, task, self.state.hint, self.state.hint_style)
        if self.state.plan != before:
            self._say_changed(before)
        self._kept, self._due = self.state.entry, self._clock() + DRAFT_SECONDS
        self._active = self._active_kept = task.active_seconds if task is not None else 0.0
        self._seen = self._clock()
        self._key = (None, "")

    def _overtaken(self, effect: Effect, error: RLHFError) -> Effect | None:
        """The task was labeled elsewhere, for example in another window of the same annotator; that label stays."""
        if effect.kind == "undo":
            self.state = with_failure(self.state, Failure(error.message, error.hint or "", Effect("next")))
            return None
        self._forget("")
        self.state = warned(self.state, "you labeled this task in another window; that label stays")
        return self._do(Effect("next"))

    def _key_for(self, what: object) -> str:
        """Idempotency key of a label: unchanged while the same label is retried."""
        if self._key[0] != what:
            self._key = (what, str(uuid.uuid4()))
        return self._key[1]

    # Time and drafts

    def _count_time(self) -> None:
        now = self._clock()
        if self.state.task is not None:
            spent = min(now - self._seen, LONGEST_PAUSE)
            self._active += spent
            self.counts.active_seconds += spent
        self._seen = now

    @property
    def _has_changed(self) -> bool:
        return self.state.task is not None and self.state.entry != self._kept

    def _keep(self) -> RLHFError | None:
        assert self.state.task is not None
        entry = self.state.entry
        try:
            self._save(entry)
        except RLHFError as error:
            self.is_draft_kept, self._due = False, self._clock() + RETRY_SECONDS
            return error
        self._kept, self._active_kept, self.is_draft_kept = entry, self._active, True
        self._due = self._clock() + DRAFT_SECONDS
        return None

    def _save(self, entry: Entry) -> None:
        assert self.state.task is not None
        task = self.state.task.id
        try:
            self._session.save_draft(self._who, task, entry, active_seconds=self._active)
        except InvalidLabelError:
            plan = self._session.plan
            if plan.display_hash == self.state.plan.display_hash:
                raise
            # The new plan asks for less: save the rest. Submitting reports the change; a draft must not interrupt.
            still_asked = with_plan(self.state, plan).entry
            self._session.save_draft(self._who, task, still_asked, active_seconds=self._active)
