"""How much is to come while completions are drawn."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from itertools import pairwise

import pytest

from rlhf_cli import progress
from rlhf_cli.generation.length_estimate import LengthEstimate
from rlhf_cli.generation.progress import Drawing

LENGTHS: dict[str, Callable[[random.Random], float]] = {
    "geometric": lambda rng: rng.expovariate(1 / 65),
    "similar": lambda rng: rng.gauss(65, 20),
    "skewed": lambda rng: rng.lognormvariate(math.log(55), 0.6),
    "all cut at the limit": lambda rng: 999.0,
    "half of them cut": lambda rng: rng.choice([15.0, 999.0]),
}


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


class Bar:
    """Stands in for a `Task`: keeps the seconds left that are shown, with the time."""

    def __init__(self, clock, per_own=1.0):
        self.clock, self.shown, self.texts, self.per_own = clock, [], [], per_own

    def within(self, units, doing, *, ended=0, rate="", left=None, is_guess=None):
        self.shown.append((self.clock[0], left))
        self.texts.append(f"{doing} {rate}")

    def advance(self, units=1, note=None):
        pass


def simulated(clock, draw, *, limit=200, count=120, batch=16, is_refilled=False, fixed=0.15, each=0.01):
    """Draw completions of random lengths; returns when estimates were shown, their ratio to the truth, and the bar.

    A step takes `fixed` seconds and `each` for every row. Batches come one after another, or rows are refilled.
    """
    rng, bar, began = random.Random(0), Bar(clock), clock[0]
    waiting = [max(1, min(limit, round(draw(rng)))) for _ in range(count)]
    drawing, rows = Drawing(count, limit, bar), []
    while waiting or rows:
        if waiting and (is_refilled or not rows):
            room = batch - len(rows)
            rows += [[length, 0] for length in waiting[:room]]
            del waiting[:room]
        clock[0] += fixed + each * len(rows)
        for row in rows:
            row[1] += 1
        ended = [now for length, now in rows if now == length]
        drawing(len(ended), len(rows), ended)
        rows = [row for row in rows if row[1] < row[0]]
    whole = clock[0] - began
    return [(at - began, (at - began + left) / whole) for at, left in bar.shown if left is not None], bar


@pytest.mark.parametrize("fixed", [0.15, 0.01], ids=["small rows", "steps as long as their rows"])
@pytest.mark.parametrize("is_refilled", [False, True], ids=["batches", "refilled"])
@pytest.mark.parametrize("name", LENGTHS)
def test_the_time_left_is_sensible_within_five_seconds_and_soon_good(clock, name, is_refilled, fixed):
    found, _ = simulated(clock, LENGTHS[name], is_refilled=is_refilled, fixed=fixed)
    assert found[0][0] < 1.5
    whole = clock[0] - 100.0
    early = [ratio for at, ratio in found if at >= 5]
    late = [ratio for at, ratio in found if at >= whole / 2]
    assert min(early) > 0.5, "too short"
    assert max(early) < 2.6, "too long"
    assert min(late) > 0.8
    assert max(late) < 1.3


@pytest.mark.parametrize("name", LENGTHS)
def test_what_is_shown_does_not_jump(clock, name):
    _, bar = simulated(clock, LENGTHS[name], limit=1024, is_refilled=True)
    shown = [(at, left) for at, left in bar.shown if left is not None]
    assert len(shown) > 10
    for (before, one), (after, other) in pairwise(shown):
        expected, change = max(one - (after - before), 0), 1.25 ** (2 * (after - before) + 1)
        assert expected / change - 3 <= other <= expected * change + 3


def test_last_rows_of_a_batch_take_time_of_their_own(clock):
    """Rate times tokens would be 1.8 times too short: most of the time few rows run."""
    found, _ = simulated(clock, lambda rng: rng.choice([20.0] * 7 + [200.0]), fixed=0.3, each=0.0005)
    late = [ratio for at, ratio in found if at >= 0.3 * (clock[0] - 100)]
    assert min(late) > 0.85
    assert max(late) < 1.15


def test_lengths_that_all_reach_the_limit_are_known_after_a_batch():
    drawing = Drawing(800, 10)
    for _ in range(5):
        for _ in range(9):
            drawing(0, 100, [])
        drawing(100, 100, [10] * 100)
    assert drawing.expected == pytest.approx(8000, rel=0.05)
    assert drawing.fraction == pytest.approx(5 / 8, rel=0.05)


def test_running_ones_need_no_more_than_the_limit():
    drawing = Drawing(4, 10)
    for _ in range(9):
        drawing(0, 4, [])
    assert 36 < drawing.expected <= 40
    drawing(4, 4, [10] * 4)
    assert drawing.fraction == 1.0


def test_a_generator_that_tells_of_completions_once_they_ended():
    drawing = Drawing(100, 50)
    for _ in range(50):
        drawing(1, 10)
    assert drawing.expected == pytest.approx(500 + 50 * 10, rel=0.15)


def test_a_generator_that_knows_no_tokens_is_measured_by_completions():
    drawing = Drawing(4, 100)
    drawing(1)
    assert drawing.fraction == 0.25


def test_rates_are_those_of_what_was_seen():
    estimate = LengthEstimate(100)
    rng = random.Random(0)
    lengths = [max(1, min(100, round(rng.gauss(60, 10)))) for _ in range(2000)]
    for length in lengths:
        estimate.drawn(length)
    mean = sum(lengths) / len(lengths)
    assert estimate.remaining() == pytest.approx(mean, rel=0.03)
    late = [length for length in lengths if length > 50]
    assert estimate.remaining(50) == pytest.approx(sum(late) / len(late) - 50, rel=0.1)
    groups = [max(lengths[start : start + 16]) for start in range(0, 2000, 16)]
    assert estimate.longest(16) == pytest.approx(sum(groups) / len(groups), rel=0.05)


def test_a_log_shows_tokens_their_rate_and_the_time_left(capsys, clock):
    with progress.task("policy completions", 8, "completions") as bar:
        drawing = Drawing(8, 100, bar)
        clock[0] += 20  # loading
        for _ in range(32):
            drawing(0, 4, [])
            clock[0] += 1
    # 32 tokens of each of four rows, one second a step: two batches of 100 steps at most, of 60 at least.
    line = capsys.readouterr().err.splitlines()[1]
    found = progress_line(line)
    assert found["tokens"] == 48
    assert found["rate"] == 4
    assert 80 < found["left"] < 188


def progress_line(line: str) -> dict[str, float]:
    """The figures of `policy completions: 0 of 8 completions, 48/~480 tokens \u00b7 4/s, ~1 min 48 s left`."""
    match = re.fullmatch(
        r"policy completions: 0 of 8 completions, (\d+)/~(\d+) tokens \u00b7 (\d+)/s, ~(\d+) min (\d+) s left", line
    )
    assert match is not None, line
    tokens, _, rate, minutes, seconds = map(float, match.groups())
    return {"tokens": tokens, "rate": rate, "left": 60 * minutes + seconds}


def test_completions_of_an_earlier_attempt_say_nothing_of_the_speed(capsys, clock):
    with progress.task("policy completions", 1008, "completions", done=1000) as bar:
        drawing = Drawing(8, 10, bar)
        drawing(0, 1)
        for _ in range(4):
            clock[0] += 10
            drawing(1, 10)
    line = capsys.readouterr().err.splitlines()[1]
    assert line.startswith("policy completions: 1,004 of 1,008 completions, 41/~")
    assert 25 < float(line.rsplit("about ", 1)[1].removesuffix(" s left")) < 45


def test_a_small_prior_leaves_the_mean_to_what_was_drawn():
    estimate = LengthEstimate(48, prior=0.5)
    assert estimate.ends == 0
    for length in (20, 22, 24, 48):
        estimate.drawn(length)
    assert estimate.ends == 3
    assert estimate.remaining() == pytest.approx((20 + 22 + 24 + 48) / 4, rel=0.15)
    assert LengthEstimate(48).remaining() == pytest.approx(LengthEstimate(48, prior=0.5).remaining())


def test_tokens_are_those_of_all_processes(clock):
    bar = Bar(clock, per_own=4.0)
    drawing = Drawing(2, 10, bar)
    for _ in range(3):
        clock[0] += 1
        drawing(0, 2, [])
    assert bar.texts[-1].startswith("24/~")
    assert bar.texts[-1].endswith(" 8/s")
