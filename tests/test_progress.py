"""Progress without a terminal: plain lines on stderr, nothing on stdout."""

from __future__ import annotations

import pytest

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
