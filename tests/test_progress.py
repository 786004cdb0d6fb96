"""Progress without a terminal: plain lines on stderr, nothing on stdout."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from rlhf_cli import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_at_the_start_and_one_at_the_end(capsys, clock):
    with progress.task("sampling", 10, "answers") as task:
        clock[0] += 2.5
        task.advance(10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "sampling: 10 answers\nsampling: done in 2.5 s\n"


def test_long_work_prints_its_progress(capsys, clock):
    with progress.task("ppo", 100, done=40) as task:
        for _ in range(6):
            clock[0] += 10
            task.advance(5, note="KL 3.2")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ppo: 60 steps"
    assert lines[1] == "ppo: 60 of 100 steps, about 1 min 20 s left, KL 3.2"  # 20 steps in 40 s, 40 to go


def test_a_line_before_anything_has_ended_guesses_no_time(capsys, clock):
    with progress.task("sampling", 100, "completions") as task:
        clock[0] += 31
        task.advance(0)
    assert capsys.readouterr().err.splitlines()[1] == "sampling: 0 of 100 completions, none has ended yet"


@pytest.mark.parametrize(("ended", "expected"), [(0, "0:12 so far"), (20, "00:18")])
def test_a_bar_shows_the_time_so_far_until_it_knows_the_time_left(ended, expected, monkeypatch):
    now, screen = [100.0], io.StringIO()
    watched = Console(file=screen, force_terminal=True, width=80, get_time=lambda: now[0])
    monkeypatch.setattr(progress, "console", watched)
    monkeypatch.setattr(progress, "interactive", lambda: True)
    with progress.task("sampling completions", 100, "completions") as task:
        for _ in range(2):
            now[0] += 6
            task.advance(ended)
    last = [line for line in screen.getvalue().replace("\r", "\n").splitlines() if "sampling" in line][-1]
    assert expected in last
    assert cell_len(Text.from_ansi(last).plain) <= 80


def test_an_error_inside_is_not_called_done(capsys, clock):
    with pytest.raises(ValueError, match="x"), progress.task("ppo", 1):
        raise ValueError("x")
    assert "done" not in capsys.readouterr().err


def test_markup_in_what_users_wrote_is_text(capsys):
    progress.say("a [bold]b[/bold] [/x]")
    progress.warn("c [red]d [/y]")
    assert capsys.readouterr().err == "a [bold]b[/bold] [/x]\nwarning: c [red]d [/y]\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (4800, "1 h 20 min"),
    ],
)
def test_durations_are_formatted_for_people(seconds, words):
    assert progress.format_duration(seconds) == words
