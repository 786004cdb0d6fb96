"""Keys to session: what is kept, what is counted, and what happens when the store cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli.data.records import Candidates
from rlhf_cli.errors import DiskError, RLHFError, UsageError
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Entry, LabelPlan
from rlhf_cli.labeling.terminal.app import run
from rlhf_cli.labeling.terminal.controller import Desk
from rlhf_cli.labeling.terminal.drawing import Screen
from rlhf_cli.labeling.terminal.keys import Key
from rlhf_cli.labeling.terminal.state import Extent
from rlhf_cli.labeling.terminal.tty import Ended, Event, Resized, Suspended, check_terminal

EXTENT = Extent(10, 40)


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


def sit(session, clock) -> Desk:
    desk = Desk(session, session.annotator("Maria"), clock)
    desk.begin()
    return desk


def press(desk: Desk, text: str):
    done = None
    for character in text:
        names = {"\r": "enter", "\b": "backspace", "\x1b": "escape"}
        key = Key(names[character]) if character in names else Key("text", character)
        done = desk.pressed(key, EXTENT)
    return done


def test_a_ranking_a_skip_and_a_flag_are_stored_as_they_were_typed(session, clock):
    desk = sit(session, clock)
    press(desk, "b=ac\rsfno answer\r")
    assert desk.state.view == "end"
    assert (desk.tally.ranked, desk.tally.skipped, desk.tally.flagged) == (1, 1, 1)
    ranked, skipped, flagged = sorted(session.labels(), key=lambda label: label.prompt)
    assert ranked.tiers == tuple(tuple(sorted(ranked.shown[p] for p in tier)) for tier in ((1, 0), (2,)))
    assert (skipped.outcome, flagged.outcome, flagged.reason) == ("skipped", "flagged", "no answer")


def test_going_back_opens_the_answer_and_going_back_again_the_one_before(session, clock):
    desk = sit(session, clock)
    press(desk, "bac\rcba\r")
    press(desk, "a")
    press(desk, "u")
    assert (desk.state.tiers, desk.state.task.number) == (((2,), (1,), (0,)), 2)
    press(desk, "u")
    assert (desk.state.tiers, desk.state.task.number) == (((1,), (0,), (2,)), 1)
    press(desk, "abc\r")
    assert desk.state.task.number == 2, "what was taken back is asked again"
    press(desk, "\r")
    assert desk.state.tiers == ((0,),), "and then what was in hand before"
    assert desk.tally.taken_back == 2
    press(desk, "bc\ru")
    assert desk.state.task.number == 3


def test_at_the_first_there_is_nothing_to_go_back_to(session, clock):
    desk = sit(session, clock)
    press(desk, "bu")
    assert "nothing to go back to" in desk.state.hint
    assert desk.state.tiers == ((1,),)


def test_what_was_entered_before_a_skip_is_there_when_one_goes_back(session, clock):
    desk = sit(session, clock)
    press(desk, "bas")
    press(desk, "u")
    assert desk.state.tiers == ((1,), (0,))


def test_time_between_keys_counts_and_a_long_pause_as_a_minute(session, clock):
    desk = sit(session, clock)
    for seconds, key in ((5, "b"), (3600, "a"), (2, "c")):
        clock.now += seconds
        press(desk, key)
    desk.woken()
    clock.now += 500
    desk.woken()  # stopped for a while
    clock.now += 3
    press(desk, "\r")
    assert [label.active_seconds for label in session.labels()] == [70.0]
    assert desk.tally.active_seconds == 70.0


def test_time_of_an_earlier_visit_counts_too(session, clock):
    desk = sit(session, clock)
    clock.now += 20
    assert press(desk, "bq").kind == "quit"
    clock.now += 9999
    desk = sit(session, clock)
    assert desk.state.hint == "resumed where you stopped"
    clock.now += 10
    press(desk, "ac\r")
    assert [label.active_seconds for label in session.labels()] == [30.0]


def test_time_spent_reading_is_kept_though_nothing_was_entered(session, clock):
    desk = sit(session, clock)
    clock.now += 20
    press(desk, "q")
    desk = sit(session, clock)
    assert desk.state.hint == ""
    assert desk.state.task.active_seconds == 20.0


def test_drafts_are_kept_together_and_not_too_late(session, clock):
    watched = Failing(session)
    desk = sit(watched, clock)
    assert desk.wait is None
    press(desk, "b")
    assert desk.wait == 2.0
    desk.tick()
    clock.now += 1.5
    press(desk, "a")
    desk.tick()
    assert [name for name, _ in watched.calls if name == "save_draft"] == []
    clock.now += 0.5
    desk.tick()
    assert session.task(1, desk.state.task.id).draft == Entry(((1,), (0,)))
    assert desk.wait is None


def test_a_full_disk_is_shown_in_place_and_the_same_answer_is_sent_again(session, clock):
    watched = Failing(session)
    desk = sit(watched, clock)
    watched.fails_after["submit"] = DiskError("disk full", hint="free some space")
    press(desk, "bac\r")
    assert (desk.state.view, desk.state.tiers) == ("trouble", ((1,), (0,), (2,)))
    assert desk.state.trouble.message == "disk full"
    watched.fails_after.clear()
    press(desk, "\r")
    first, second = (kwargs["key"] for name, kwargs in watched.calls if name == "submit")
    assert first == second, "stored once, though nobody knew whether it had been"
    assert len(session.labels()) == 1
    assert desk.state.task.number == 2
    press(desk, "bac\r")
    assert [kwargs["key"] for name, kwargs in watched.calls if name == "submit"][-1] != first


def test_an_answer_that_is_given_again_after_going_back_is_stored_again(session, clock):
    desk = sit(session, clock)
    press(desk, "bac\ru\r")
    assert [label.outcome for label in session.labels()] == ["ranked"]


def test_a_draft_that_cannot_be_kept_is_said_and_quitting_asks(session, clock):
    watched = Failing(session)
    desk = sit(watched, clock)
    watched.fails["save_draft"] = DiskError("disk full")
    press(desk, "b")
    clock.now += 2
    desk.tick()
    assert "not on disk yet: disk full" in desk.state.hint
    assert press(desk, "q") is None
    assert desk.state.view == "trouble"
    assert press(desk, "\r") is None
    assert press(desk, "q").kind == "leave"
    assert not desk.is_draft_kept
    press(desk, "\x1b")
    watched.fails.clear()
    assert press(desk, "q").kind == "quit"
    assert desk.is_draft_kept


def test_going_back_waits_for_the_draft(session, clock):
    watched = Failing(session)
    desk = sit(watched, clock)
    press(desk, "bac\rc")
    watched.fails["save_draft"] = DiskError("disk full")
    press(desk, "u")
    assert (desk.state.view, len(session.labels())) == ("trouble", 1)
    watched.fails.clear()
    press(desk, "\r")
    assert desk.state.task.number == 1


def test_the_next_task_is_asked_for_again(session, clock):
    watched = Failing(session)
    watched.fails["next"] = DiskError("cannot be read")
    desk = sit(watched, clock)
    assert (desk.state.view, desk.state.task) == ("trouble", None)
    watched.fails.clear()
    press(desk, "\r")
    assert desk.state.task.number == 1
    watched.fails["next"] = DiskError("cannot be read")
    press(desk, "bac\r")
    assert (desk.state.view, len(session.labels())) == ("trouble", 1)
    assert press(desk, "q").kind == "quit", "there is no draft to keep"
    watched.fails.clear()
    press(desk, "\r")
    assert desk.state.task.number == 2


def test_an_answer_from_another_window_stays(session, clock):
    desk, other = sit(session, clock), sit(session, clock)
    press(other, "abc\r")
    press(desk, "cba\r")
    assert "another window" in desk.state.hint
    assert desk.state.task.number == 2
    assert [label.tiers for label in session.labels()] == [
        tuple((session.labels()[0].shown[position],) for position in (0, 1, 2))
    ]


def test_guidelines_are_shown_first_to_those_who_are_new(session, clock):
    session.prepare(LabelPlan(guidelines="Be fair."), [Candidates("Question?", ("x", "y"))])
    desk = sit(session, clock)
    assert desk.state.view == "help"
    press(desk, "\r" + "ab\r")
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
    desk = sit(session, clock)
    assert run(desk, Scripted(Key("text", "b"), Resized(), Suspended(), Key("control", "z"), Ended(15))) == 15
    assert session.task(1, desk.state.task.id).draft == Entry(((1,),))


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
    with pytest.raises(UsageError, match="stdin and stderr are none"):
        check_terminal()
    monkeypatch.setattr("rlhf_cli.labeling.terminal.tty.termios", None)
    with pytest.raises(UsageError, match="key by key"):
        check_terminal()


def asked(session: LabelSession, **plan) -> LabelPlan:
    """Change what is asked while somebody labels."""
    items = [Candidates(f"Question {n}?", (f"{n} x", f"{n} y", f"{n} z")) for n in range(3)]
    changed = LabelPlan(**plan)
    session.prepare(changed, items)
    return changed


def test_criteria_that_come_while_somebody_labels_are_asked_at_once_and_what_was_entered_stays(session, clock):
    desk = sit(session, clock)
    press(desk, "bac")
    asked(session, criteria=("honest",))
    press(desk, "\r")
    assert (desk.state.view, desk.state.hint) == ("rank", "what is asked has changed")
    assert desk.state.tiers == ((1,), (0,), (2,))
    press(desk, "\r453\r")
    (label,) = session.labels()
    assert [label.marks["honest"][index] for index in label.shown] == [4, 5, 3]
    assert desk.state.task.number == 2


def test_guidelines_that_change_are_shown_before_a_label_counts_as_given_under_them(session, clock):
    asked(session, guidelines="Prefer what is short.")
    desk = sit(session, clock)
    press(desk, "\rbac")
    changed = asked(session, guidelines="Prefer what is true.")
    press(desk, "\r")
    assert session.labels() == []
    assert (desk.state.view, desk.state.hint) == ("help", "what is asked has changed")
    assert desk.state.plan.guidelines == "Prefer what is true."
    press(desk, "\r\r")
    (label,) = session.labels()
    assert label.guidelines == changed.guidelines_hash


def test_the_next_task_brings_what_is_asked_by_then(session, clock):
    desk = sit(session, clock)
    asked(session, criteria=("honest",), guidelines="Prefer what is true.")
    press(desk, "s")
    assert (desk.state.view, desk.state.hint) == ("help", "what is asked has changed")
    assert desk.state.plan.criteria == ("honest",)
    assert desk.state.empty_cell == (0, 0)
    asked(session)
    press(desk, "\ru")
    assert desk.state.plan.criteria == ()
    assert "what is asked has changed; this answer was taken back" in desk.state.hint


def test_marks_that_nobody_asks_for_any_more_hold_nothing_up(session, clock):
    asked(session, criteria=("honest", "kind"))
    desk = sit(session, clock)
    press(desk, "bac51")
    asked(session, criteria=("kind",))
    assert desk.keep() is None
    assert session.next(session.annotator("Maria").id).draft.marks == {"kind": (1, None, None)}
    press(desk, "\r")
    assert desk.state.view == "marks", "more is to be marked anyway"
    press(desk, "2345\r")
    assert (desk.state.view, desk.state.hint) == ("rank", "what is asked has changed")
    assert desk.state.marks == ((1,), (3,), (5,))
    press(desk, "\r")
    (label,) = session.labels()
    assert [label.marks["kind"][index] for index in label.shown] == [1, 3, 5]
