"""Any order of assigning, answering, answering again, taking back and crashing, against a model that is a dictionary.

Two sessions work on one file, as a terminal beside a server does; a crash throws both away, in the middle of a
transaction too.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from rlhf_cli.data.records import Candidates
from rlhf_cli.labeling.session.assignment import LEASE_MS
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Entry, LabelConflictError, LabelTask, UnknownTaskError

ITEMS = [Candidates(f"q{n}", tuple(f"a{n}.{k}" for k in range(2 + n % 3))) for n in range(7)]
PLAN = LabelPlan(overlap=2, set_aside_after=2, repeat_share=0.3, seed=3)


class CrashError(Exception):
    """The process dies here."""


class Labeling(RuleBasedStateMachine):
    """The model: what every task's standing answer is."""

    tasks = Bundle("tasks")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "labels.sqlite"
        self.now = 1_790_000_000.0
        self.sessions: list[LabelSession] = []
        self.reopen()
        self.people = [self.sessions[0].annotator(name).id for name in ("Ann", "Bo", "Cy")]
        self.answers: dict[int, tuple[str, object]] = {}
        self.order: dict[int, list[int]] = {who: [] for who in self.people}
        self.owner: dict[int, int] = {}
        self.drafts: dict[int, Entry | None] = {}
        self.tasks_seen: dict[int, LabelTask] = {}
        self.keys = 0

    def reopen(self) -> None:
        for session in self.sessions:
            session.close()
        self.sessions = [LabelSession(self.path, clock=lambda: self.now) for _ in range(2)]
        self.sessions[0].prepare(PLAN, ITEMS)

    def key(self) -> str:
        self.keys += 1
        return f"key {self.keys}"

    def entry(self, task: LabelTask, data) -> Entry:
        count = len(task.completions)
        order = data.draw(st.permutations(range(count)))
        cuts = data.draw(st.sets(st.integers(1, count - 1)))
        bounds = [0, *sorted(cuts), count]
        return Entry(tuple(tuple(sorted(order[a:b])) for a, b in itertools.pairwise(bounds)))

    @rule(target=tasks, who=st.integers(0, 2), via=st.integers(0, 1))
    def assign(self, who, via):
        person = self.people[who]
        task = self.sessions[via].next(person)
        if task is None:
            return multiple()
        assert self.owner.setdefault(task.id, person) == person
        assert task.id not in self.answers, "a task that was answered is handed out"
        assert task.draft == self.drafts.get(task.id)
        self.tasks_seen[task.id] = task
        assert self.sessions[1 - via].next(person) == task, "the task in hand is what comes next, whoever asks"
        return task

    @rule(task=tasks, via=st.integers(0, 1), data=st.data())
    def submit(self, task, via, data):
        person, entry = self.owner[task.id], self.entry(task, data)
        session, key = self.sessions[via], self.key()
        before = self.answers.get(task.id)
        if before not in (None, ("ranked", entry)):
            self.refused(lambda: session.submit(person, task.id, entry, key=key, active_seconds=1))
            return
        receipt = session.submit(person, task.id, entry, key=key, active_seconds=1)
        assert receipt.is_new == (before is None)
        again = self.sessions[1 - via].submit(person, task.id, entry, key=key, active_seconds=1)
        assert (again.action, again.is_new) == (receipt.action, False)
        if before is None:
            self.answers[task.id] = ("ranked", entry)
            self.order[person].append(task.id)

    @rule(task=tasks, via=st.integers(0, 1), how=st.sampled_from(["skipped", "flagged"]))
    def pass_on(self, task, via, how):
        person, session, key = self.owner[task.id], self.sessions[via], self.key()

        def act():
            if how == "skipped":
                return session.skip(person, task.id, key=key, active_seconds=1, reason="odd")
            return session.flag(person, task.id, key=key, active_seconds=1, reason="odd")

        before = self.answers.get(task.id)
        if before not in (None, (how, "odd")):
            self.refused(act)
            return
        assert act().is_new == (before is None)
        if before is None:
            self.answers[task.id] = (how, "odd")
            self.order[person].append(task.id)

    @rule(who=st.integers(0, 2), via=st.integers(0, 1))
    def undo(self, who, via):
        person, key = self.people[who], self.key()
        task = self.sessions[via].undo(person, key=key)
        if not self.order[person]:
            assert task is None
            return
        last = self.order[person].pop()
        kind, what = self.answers.pop(last)
        assert task.id == last
        self.drafts[last] = what if kind == "ranked" else self.drafts.get(last)
        assert task.draft == self.drafts[last]
        assert self.sessions[1 - via].undo(person, key=key).id == last, "an undo sent twice is one"

    @rule(task=tasks, data=st.data(), via=st.integers(0, 1))
    def draft(self, task, data, via):
        entry = self.entry(task, data)
        self.sessions[via].save_draft(self.owner[task.id], task.id, entry, active_seconds=0)
        if task.id not in self.answers:
            self.drafts[task.id] = entry
            assert self.sessions[1 - via].task(self.owner[task.id], task.id).draft == entry

    @rule(task=consumes(tasks), who=st.integers(0, 2))
    def answer_for_another(self, task, who):
        if self.people[who] != self.owner[task.id]:
            try:
                self.sessions[0].skip(self.people[who], task.id, key=self.key(), active_seconds=0)
                raise AssertionError("somebody answered for another")
            except UnknownTaskError:
                pass

    @rule()
    def crash(self):
        self.reopen()

    @precondition(lambda self: any(number not in self.answers for number in self.tasks_seen))
    @rule(via=st.integers(0, 1))
    def crash_inside_a_transaction(self, via):
        number = next(number for number in self.tasks_seen if number not in self.answers)
        session, person = self.sessions[via], self.owner[number]
        try:
            with session.transaction():
                session.skip(person, number, key=self.key(), active_seconds=0)
                session.annotator("nobody")
                raise CrashError
        except CrashError:
            pass

    @rule(minutes=st.sampled_from([1, LEASE_MS // 60_000 + 1]))
    def time_passes(self, minutes):
        self.now += 60 * minutes

    def refused(self, act) -> None:
        try:
            act()
        except LabelConflictError:
            return
        raise AssertionError("a second, different answer was taken")

    @invariant()
    def what_is_exported_is_what_was_answered(self):
        exported = [session.labels() for session in self.sessions]
        assert exported[0] == exported[1]
        names = dict(zip(self.people, ("Ann", "Bo", "Cy"), strict=True))
        expected = Counter()
        for number, (kind, what) in self.answers.items():
            task = self.tasks_seen[number]
            ranked = kind == "ranked"
            tiers = tuple(frozenset(task.completions[i] for i in tier) for tier in what.tiers) if ranked else what
            expected[(names[self.owner[number]], task.prompt, kind, tiers)] += 1
        found = Counter(
            (
                label.annotator,
                label.prompt,
                label.outcome,
                tuple(frozenset(label.completions[i] for i in tier) for tier in label.tiers)
                if label.outcome == "ranked"
                else label.reason,
            )
            for label in exported[0]
        )
        assert found == expected

    @invariant()
    def nobody_has_an_item_twice_but_as_a_repeat(self):
        rounds = Counter((label.annotator, label.item, label.purpose) for label in self.sessions[0].labels())
        assert all(count == 1 for count in rounds.values())

    @invariant()
    def sums_are_those_of_the_labels(self):
        ordinary = [label for label in self.sessions[1].labels() if label.purpose == "label"]
        ranked = Counter(label.item for label in ordinary if label.outcome == "ranked")
        refused = Counter(label.item for label in ordinary if label.outcome != "ranked")
        progress = self.sessions[1].progress()
        done = sum(ranked[item] >= 2 or refused[item] >= 2 for item in ranked | refused)
        assert (progress.labels, progress.done) == (ranked.total(), done)
        open_items = [item for item in ranked if ranked[item] < 2 and refused[item] < 2]
        assert progress.labels_left == 2 * (len(ITEMS) - done) - sum(ranked[item] for item in open_items)

    def teardown(self):
        for session in self.sessions:
            session.close()
        self.folder.cleanup()


Labeling.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestLabeling = Labeling.TestCase


_WORKER = """
import sys
from pathlib import Path
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import (Entry)
session = LabelSession(Path(sys.argv[1]), create=False)
who = session.annotator("Ann").id
while (task := session.next(who)) is not None:
    session.submit(who, task.id, Entry(((1,), (0,))), key=f"key {task.id}", active_seconds=0)
    print(task.id, flush=True)
"""


@pytest.mark.slow
def test_what_was_acknowledged_outlives_kill_9_and_is_there_once(tmp_path):
    path = tmp_path / "labels.sqlite"
    session = LabelSession(path)
    session.prepare(LabelPlan(), [Candidates(f"q{n}", ("a", "b")) for n in range(20_000)])
    session.close()
    acknowledged: list[int] = []
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", _WORKER, str(path)], stdout=subprocess.PIPE, text=True)
        acknowledged.append(int(process.stdout.readline()))
        time.sleep(0.05 + 0.07 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += [int(line) for line in process.communicate()[0].split("\n")[:-1]]
    assert len(acknowledged) > 40
    assert len(set(acknowledged)) == len(acknowledged)
    reopened = LabelSession(path)
    stored = reopened.labels()
    assert len(acknowledged) <= len(stored) <= len(acknowledged) + 4
    assert len({label.item for label in stored}) == len(stored)
