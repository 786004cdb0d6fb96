"""Keys to session: what is kept, what is counted, and what happens when the store cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli.data.records import Candidates
from rlhf_cli.errors import DiskError, RLHFError, UsageError
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Entry, Growth, SamplerStatus
from rlhf_cli.labeling.terminal.app import run
from rlhf_cli.labeling.terminal.controller import Controller
from rlhf_cli.labeling.terminal.drawing import Screen
from rlhf_cli.labeling.terminal.keys import Key
from rlhf_cli.labeling.terminal.state import ScrollArea
from rlhf_cli.labeling.terminal.tty import Ended, Event, Resized, Suspended, check_terminal

EXTENT = ScrollArea(10, 40)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Failing:
    """A session whose methods can be made to fail, before or after they have done their work."""

    def __init__(self, session: LabelSession) -> None:
        self.session = session
        self.fails: dict[str, RLHFError] = {}
        self.fails_after: dict[str, RLHFError] = {}
        self.calls: list[tuple[str, dict]] = []

    def __getattr__(self, name):
        real = getattr(self.session, name)
        if not callable(real):
            return real

        def call(*args, **kwargs):
            self.calls.append((name, kwargs))
            if name in self.fails:
                raise self.fails[name]
            result = real(*args, **kwargs)
            if name in self.fails_after:
                raise self.fails_after[name]
            return result

        return call


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def session(tmp_path: Path, clock):
    session = LabelSession(tmp_path / "labels.db", clock=clock)
    session.prepare(LabelPlan(), [Candidates(f"Question {n}?", (f"{n} x", f"{n} y", f"{n} z")) for n in range(3)])
    clock.now += 1000  # nobody was at a task for longer than they have had it
    yield session
    session.close()


def sit(session, clock) -> Controller:
    controller = Controller(session, session.annotator("Maria"), clock)
    controller.begin()
    return controller


def press(controller: Controller, text: str):
    done = None
    for character in text:
        names = {"\r": "enter", "\b": "backspace", "\x1b": "escape"}
        key = Key(names[character]) if character in names else Key("text", character)
        done = controller.pressed(key, EXTENT)
    return done


def test_a_ranking_a_skip_and_a_flag_are_stored_as_they_were_typed(session, clock):
    controller = sit(session, clock)
    press(controller, "b=ac\rsfno answer\r")
    assert controller.state.view == "end"
    assert (controller.counts.ranked, controller.counts.skipped, controller.counts.flagged) == (1, 1, 1)
    ranked, skipped, flagged = sorted(session.labels(), key=lambda label: label.prompt)
    assert ranked.tiers == tuple(tuple(sorted(ranked.shown[p] for p in tier)) for tier in ((1, 0), (2,)))
    assert (skipped.outcome, flagged.outcome, flagged.reason) == ("skipped", "flagged", "no answer")


def test_going_back_opens_the_answer_and_going_back_again_the_one_before(session, clock):
    controller = sit(session, clock)
    press(controller, "bac\rcba\r")
    press(controller, "a")
    press(controller, "u")
    assert (controller.state.tiers, controller.state.task.number) == (((2,), (1,), (0,)), 2)
    press(controller, "u")
    assert (controller.state.tiers, controller.state.task.number) == (((1,), (0,), (2,)), 1)
    press(controller, "abc\r")
    assert controller.state.task.number == 2, "what was taken back is asked again"
    press(controller, "\r")
    assert controller.state.tiers == ((0,),), "and then what was in hand before"
    assert controller.counts.undone == 2
    press(controller, "bc\ru")
    assert controller.state.task.number == 3


def test_at_the_first_there_is_nothing_to_go_back_to(session, clock):
    controller = sit(session, clock)
    press(controller, "bu")
    assert "nothing to undo" in controller.state.hint
    assert controller.state.tiers == ((1,),)


def test_what_was_entered_before_a_skip_is_there_when_one_goes_back(session, clock):
    controller = sit(session, clock)
    press(controller, "bas")
    press(controller, "u")
    assert controller.state.tiers == ((1,), (0,))


def test_time_between_keys_counts_and_a_long_pause_as_a_minute(session, clock):
    controller = sit(session, clock)
    for seconds, key in ((5, "b"), (3600, "a"), (2, "c")):
        clock.now += seconds
        press(controller, key)
    controller.woken()
    clock.now += 500
    controller.woken()  # stopped for a while
    clock.now += 3
    press(controller, "\r")
    assert [label.active_seconds for label in session.labels()] == [70.0]
    assert controller.counts.active_seconds == 70.0


def test_time_of_an_earlier_visit_counts_too(session, clock):
    controller = sit(session, clock)
    clock.now += 20
    assert press(controller, "bq").kind == "quit"
    clock.now += 9999
    controller = sit(session, clock)
    assert controller.state.hint == "resumed your draft"
    clock.now += 10
    press(controller, "ac\r")
    assert [label.active_seconds for label in session.labels()] == [30.0]


def test_time_spent_reading_is_kept_though_nothing_was_entered(session, clock):
    controller = sit(session, clock)
    clock.now += 20
    press(controller, "q")
    controller = sit(session, clock)
    assert controller.state.hint == ""
    assert controller.state.task.active_seconds == 20.0


def test_drafts_are_kept_together_and_not_too_late(session, clock):
    watched = Failing(session)
    controller = sit(watched, clock)
    assert controller.wait is None
    press(controller, "b")
    assert controller.wait == 2.0
    controller.tick()
    clock.now += 1.5
    press(controller, "a")
    controller.tick()
    assert [name for name, _ in watched.calls if name == "save_draft"] == []
    clock.now += 0.5
    controller.tick()
    assert session.task(1, controller.state.task.id).draft == Entry(((1,), (0,)))
    assert controller.wait is None


def test_a_full_disk_is_shown_in_place_and_the_same_answer_is_sent_again(session, clock):
    watched = Failing(session)
    controller = sit(watched, clock)
    watched.fails_after["submit"] = DiskError("disk full", hint="free some space")
    press(controller, "bac\r")
    assert (controller.state.view, controller.state.tiers) == ("failure", ((1,), (0,), (2,)))
    assert controller.state.failure.message == "disk full"
    watched.fails_after.clear()
    press(controller, "\r")
    first, second = (kwargs["key"] for name, kwargs in watched.calls if name == "submit")
    assert first == second, "stored once, though nobody knew whether it had been"
    assert len(session.labels()) == 1
    assert controller.state.task.number == 2
    press(controller, "bac\r")
    assert [kwargs["key"] for name, kwargs in watched.calls if name == "submit"][-1] != first


def test_an_answer_that_is_given_again_after_going_back_is_stored_again(session, clock):
    controller = sit(session, clock)
    press(controller, "bac\ru\r")
    assert [label.outcome for label in session.labels()] == ["ranked"]


def test_a_draft_that_cannot_be_kept_is_said_and_quitting_asks(session, clock):
    watched = Failing(session)
    controller = sit(watched, clock)
    watched.fails["save_draft"] = DiskError("disk full")
    press(controller, "b")
    clock.now += 2
    controller.tick()
    assert "not saved yet: disk full" in controller.state.hint
    assert press(controller, "q") is None
    assert controller.state.view == "failure"
    assert press(controller, "\r") is None
    assert press(controller, "q").kind == "leave"
    assert not controller.is_draft_kept
    press(controller, "\x1b")
    watched.fails.clear()
    assert press(controller, "q").kind == "quit"
    assert controller.is_draft_kept


def test_going_back_waits_for_the_draft(session, clock):
    watched = Failing(session)
    controller = sit(watched, clock)
    press(controller, "bac\rc")
    watched.fails["save_draft"] = DiskError("disk full")
    press(controller, "u")
    assert (controller.state.view, len(session.labels())) == ("failure", 1)
    watched.fails.clear()
    press(controller, "\r")
    assert controller.state.task.number == 1


def test_the_next_task_is_asked_for_again(session, clock):
    watched = Failing(session)
    watched.fails["next"] = DiskError("cannot be read")
    controller = sit(watched, clock)
    assert (controller.state.view, controller.state.task) == ("failure", None)
    watched.fails.clear()
    press(controller, "\r")
    assert controller.state.task.number == 1
    watched.fails["next"] = DiskError("cannot be read")
    press(controller, "bac\r")
    assert (controller.state.view, len(session.labels())) == ("failure", 1)
    assert press(controller, "q").kind == "quit", "there is no draft to keep"
    watched.fails.clear()
    press(controller, "\r")
    assert controller.state.task.number == 2


def test_an_answer_from_another_window_stays(session, clock):
    controller, other = sit(session, clock), sit(session, clock)
    press(other, "abc\r")
    press(controller, "cba\r")
    assert "another window" in controller.state.hint
    assert controller.state.task.number == 2
    assert [label.tiers for label in session.labels()] == [
        tuple((session.labels()[0].shown[position],) for position in (0, 1, 2))
    ]


def test_guidelines_are_shown_first_to_those_who_are_new(session, clock):
    session.prepare(LabelPlan(guidelines="Be fair."), [Candidates("Question?", ("x", "y"))])
    controller = sit(session, clock)
    assert controller.state.view == "help"
    press(controller, "\r" + "ab\r")
    session.prepare(LabelPlan(guidelines="Be fair."), [Candidates("Another?", ("x", "y"))])
    assert sit(session, clock).state.view == "rank"


class Scripted:
    """A terminal that gives events in order."""

    def __init__(self, *events: Event, slow: Clock | None = None) -> None:
        self.waiting = [list(events[n : n + 1]) for n in range(len(events))]
        self.did: list[str] = []

    def size(self):
        return 80, 24

    def draw(self, screen: Screen) -> None:
        self.did.append("draw")

    def events(self, timeout):
        return self.waiting.pop(0)

    def forget_keys(self):
        self.did.append("forget")

    def repaint(self):
        self.did.append("repaint")

    def suspend(self):
        self.did.append("suspend")


def test_a_signal_keeps_the_draft_and_ends(session, clock):
    controller = sit(session, clock)
    assert run(controller, Scripted(Key("text", "b"), Resized(), Suspended(), Key("control", "z"), Ended(15))) == 15
    assert session.task(1, controller.state.task.id).draft == Entry(((1,),))


def test_keys_pressed_while_the_store_was_slow_are_not_for_the_next_task(session, clock, monkeypatch):
    times = iter(range(0, 1000, 7))
    monkeypatch.setattr("rlhf_cli.labeling.terminal.app.time.monotonic", lambda: next(times))
    terminal = Scripted()
    terminal.waiting = [[Key("text", "b"), Key("text", "a")], [Key("control", "c")]]
    assert run(sit(session, clock), terminal) is None
    assert terminal.did == ["draw", "forget", "draw"]


@pytest.mark.parametrize("kind", ["", "dumb"])
def test_without_a_terminal_that_places_text_the_browser_is_named(monkeypatch, kind):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", kind)
    with pytest.raises(UsageError) as error:
        check_terminal()
    assert "--serve" in error.value.hint


def test_without_any_terminal_too(monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    with pytest.raises(UsageError, match="needs an interactive terminal"):
        check_terminal()
    monkeypatch.setattr("rlhf_cli.labeling.terminal.tty.termios", None)
    with pytest.raises(UsageError, match="no terminal that supports raw input"):
        check_terminal()


def asked(session: LabelSession, **plan) -> LabelPlan:
    """Change what is asked while somebody labels."""
    items = [Candidates(f"Question {n}?", (f"{n} x", f"{n} y", f"{n} z")) for n in range(3)]
    changed = LabelPlan(**plan)
    session.prepare(changed, items)
    return changed


def test_criteria_that_come_while_somebody_labels_are_asked_at_once_and_what_was_entered_stays(session, clock):
    controller = sit(session, clock)
    press(controller, "bac")
    asked(session, criteria=("honest",))
    press(controller, "\r")
    assert (controller.state.view, controller.state.hint) == ("rank", "the instructions have changed")
    assert controller.state.tiers == ((1,), (0,), (2,))
    press(controller, "\r453\r")
    (label,) = session.labels()
    assert [label.marks["honest"][index] for index in label.shown] == [4, 5, 3]
    assert controller.state.task.number == 2


def test_guidelines_that_change_are_shown_before_a_label_counts_as_given_under_them(session, clock):
    asked(session, guidelines="Prefer what is short.")
    controller = sit(session, clock)
    press(controller, "\rbac")
    changed = asked(session, guidelines="Prefer what is true.")
    press(controller, "\r")
    assert session.labels() == []
    assert (controller.state.view, controller.state.hint) == ("help", "the instructions have changed")
    assert controller.state.plan.guidelines == "Prefer what is true."
    press(controller, "\r\r")
    (label,) = session.labels()
    assert label.guidelines == changed.guidelines_hash


def test_the_next_task_brings_what_is_asked_by_then(session, clock):
    controller = sit(session, clock)
    asked(session, criteria=("honest",), guidelines="Prefer what is true.")
    press(controller, "s")
    assert (controller.state.view, controller.state.hint) == ("help", "the instructions have changed")
    assert controller.state.plan.criteria == ("honest",)
    assert controller.state.empty_cell == (0, 0)
    asked(session)
    press(controller, "\ru")
    assert controller.state.plan.criteria == ()
    assert "the instructions have changed; this label was undone" in controller.state.hint


def test_marks_that_nobody_asks_for_any_more_hold_nothing_up(session, clock):
    asked(session, criteria=("honest", "kind"))
    controller = sit(session, clock)
    press(controller, "bac51")
    asked(session, criteria=("kind",))
    assert controller.keep() is None
    assert session.next(session.annotator("Maria").id).draft.marks == {"kind": (1, None, None)}
    press(controller, "\r")
    assert controller.state.view == "marks", "more is to be marked anyway"
    press(controller, "2345\r")
    assert (controller.state.view, controller.state.hint) == ("rank", "the instructions have changed")
    assert controller.state.marks == ((1,), (3,), (5,))
    press(controller, "\r")
    (label,) = session.labels()
    assert [label.marks["kind"][index] for index in label.shown] == [1, 3, 5]


# While completions are sampled


@pytest.fixture
def growing(tmp_path: Path, clock):
    """A session with one of three items, and what its interface knows of the sampling."""
    session = LabelSession(tmp_path / "growing.db", clock=clock)
    session.begin_growth(LabelPlan(), item(0), growth=Growth(1, 3))
    clock.now += 1000
    yield session
    session.close()


def item(number: int) -> list[Candidates]:
    return [Candidates(f"Question {number}?", (f"{number} x", f"{number} y"))]


def at_work(session, clock, *, is_running: bool = True) -> Controller:
    sampler = SamplerStatus(lambda: is_running)
    controller = Controller(session, session.annotator("Maria"), clock, sampler)
    controller.begin()
    return controller


def look(controller: Controller, clock) -> None:
    clock.now += controller.wait or 0.0
    controller.tick()


def test_who_has_labeled_all_that_is_ready_waits_and_goes_on(growing, clock):
    controller = at_work(growing, clock)
    press(controller, "ab")
    controller.pressed(Key("enter"), EXTENT)
    assert controller.state.is_waiting
    assert press(controller, "\r") is None, "Enter, pressed once too often, does not quit"
    assert 0 < (controller.wait or 0) <= 1, "it looks again by itself"
    look(controller, clock)
    assert controller.state.is_waiting
    growing.grow(item(1), Growth(2, 3))
    look(controller, clock)
    assert controller.state.task.prompt == "Question 1?"
    assert controller.state.progress.growth == Growth(2, 3)
    assert (controller.state.progress.mine, controller.state.progress.left_for_me) == (1, 2)


def test_progress_of_sampling_is_shown_beside_an_entry_that_stays(growing, clock):
    controller = at_work(growing, clock)
    press(controller, "b")
    growing.grow(item(1), Growth(2, 3))
    look(controller, clock)
    assert controller.state.tiers == ((1,),)
    assert controller.state.progress.growth == Growth(2, 3)
    growing.prepare(LabelPlan(), item(0) + item(1) + item(2))
    look(controller, clock)
    assert controller.state.progress.growth is None
    assert controller.state.tiers == ((1,),)
    clock.now += 10
    controller.tick()
    assert controller.wait is None, "nothing to look for any more"


def test_a_session_opens_before_anything_is_ready_and_the_first_task_appears(tmp_path, clock):
    session = LabelSession(tmp_path / "empty.db", clock=clock)
    session.begin_growth(LabelPlan(), [], growth=Growth(1, 2))
    controller = at_work(session, clock)
    assert controller.state.is_waiting
    session.grow(item(1), Growth(2, 2))
    look(controller, clock)
    assert controller.state.task.prompt == "Question 1?"
    session.close()


def test_nobody_waits_for_sampling_that_has_stopped(growing, clock):
    controller = at_work(growing, clock, is_running=False)
    press(controller, "ab")
    controller.pressed(Key("enter"), EXTENT)
    assert controller.state.view == "end"
    assert not controller.state.is_waiting
    done = controller.pressed(Key("enter"), EXTENT)
    assert done is not None
    assert done.kind == "quit"


def test_the_loop_ends_and_keeps_the_draft_when_sampling_fails(growing, clock):
    sampler = SamplerStatus(lambda: True)
    controller = Controller(growing, growing.annotator("Maria"), clock, sampler)
    controller.begin()

    class Failing(Scripted):
        def events(self, timeout):
            assert timeout is not None, "it would wait for a key, and never see the failure"
            sampler.has_failed.set()
            return super().events(timeout)

    assert run(controller, Failing(Key("text", "b"))) is None
    assert controller.has_failed
    assert growing.task(1, 1).draft == Entry(((1,),))


def test_a_store_that_cannot_be_read_is_reported_and_the_entry_stays(growing, clock):
    failing = Failing(growing)
    controller = at_work(failing, clock)
    press(controller, "b")
    failing.fails["progress"] = DiskError("the disk fails")
    look(controller, clock)
    assert "the disk fails" in controller.state.hint
    assert controller.state.tiers == ((1,),)
    del failing.fails["progress"]
    growing.grow(item(1), Growth(2, 3))
    clock.now += 2
    controller.tick()
    assert controller.state.progress.growth == Growth(2, 3)


def test_the_first_screen_explains_more_tasks_than_prompts_once(tmp_path, clock):
    session = LabelSession(tmp_path / "labels.sqlite")
    items = [Candidates(f"question {n}", ("one", "two")) for n in range(30)]
    session.prepare(LabelPlan(repeat_share=0.2, seed=1), items)
    person = session.annotator("Ann")
    controller = Controller(session, person, clock)
    controller.begin()
    assert "tasks: 30 prompts, " in controller.state.hint
    controller.pressed(Key("text", "a"), EXTENT)
    assert "prompts" not in controller.state.hint
    session.submit(person.id, controller.state.task.id, Entry(((0,), (1,))), key="first", active_seconds=0)
    later = Controller(session, person, clock)
    later.begin()
    assert later.state.hint == ""
