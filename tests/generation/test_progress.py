"""How much is to come while completions are drawn."""

from __future__ import annotations

import pytest

from rlhf_cli import progress
from rlhf_cli.generation.progress import Drawing


def test_before_any_ends_each_may_reach_the_limit():
    drawing = Drawing(4, 10)
    drawing(0, 4)
    assert drawing.expected == 40
    assert drawing.fraction == pytest.approx(0.1)


def test_then_their_mean_length_is_estimated_from_ended_and_running_ones():
    drawing = Drawing(100, 50)
    for _ in range(5):
        drawing(1, 10)
    assert drawing.expected == 100 * 10  # 50 tokens, 5 ends: one end in ten tokens
    drawing(0, 200)
    assert drawing.expected == 100 * 50  # 250 tokens, 5 ends


def test_whole_batches_at_the_limit_are_exact():
    drawing = Drawing(8, 10)
    for _ in range(9):
        drawing(0, 4)
    drawing(4, 4)
    assert drawing.expected == 80
    assert drawing.fraction == 0.5


def test_those_that_run_need_a_token_each_and_no_more_than_the_limit():
    drawing = Drawing(4, 100)
    drawing(3, 6)
    assert drawing.expected == pytest.approx(8)
    drawing(0, 60)
    assert drawing.expected == pytest.approx(88)
    drawing(1, 1)
    assert drawing.fraction == 1.0


def test_a_generator_that_knows_no_tokens_is_measured_by_completions():
    drawing = Drawing(4, 100)
    drawing(1)
    assert drawing.fraction == 0.25


def test_a_log_shows_tokens_their_rate_and_the_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.task("policy completions", 8, "completions") as bar:
        drawing = Drawing(8, 100, bar)
        now[0] += 20  # loading
        for _ in range(12):
            drawing(0, 4)
            now[0] += 1
    # After the twelfth call 48 tokens; 44 of them in the 11 s since the first; 800 - 48 to come at 4/s.
    assert capsys.readouterr().err.splitlines()[1] == (
        "policy completions: 0 of 8 completions, 48 tokens \u00b7 4 tokens/s, ~3 min 08 s left"
    )


def test_completions_of_an_earlier_attempt_say_nothing_of_the_speed(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.task("policy completions", 1008, "completions", done=1000) as bar:
        drawing = Drawing(8, 10, bar)
        drawing(0, 1)
        for _ in range(4):
            now[0] += 10
            drawing(1, 10)
    # 41 tokens of 4 that ended, at most 10 each: 80 expected, one token a second.
    assert capsys.readouterr().err.splitlines()[1] == (
        "policy completions: 1,004 of 1,008 completions, 41 tokens \u00b7 1 tokens/s, about 39.0 s left"
    )
