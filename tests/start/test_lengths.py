"""The limit of completions, from lengths of a few: what it cuts off, and what a longer one costs."""

from __future__ import annotations

import random

import pytest

from rlhf_cli.start.lengths import LIMITS, Lengths

KNOWN = Lengths([10, 20, 30, 40, 50, 60, 70, 80, 90, 200])


def test_the_smallest_limit_within_which_three_quarters_end():
    assert KNOWN.limit(1024) == 96
    assert (KNOWN.share_ended(96), KNOWN.share_ended(64)) == (0.9, 0.6)
    assert Lengths([5, 6, 7]).limit(1024) == LIMITS[0]
    assert Lengths([700, 701, 702, 1]).limit(1024) == 768


def test_no_limit_is_longer_than_the_model_reads():
    assert KNOWN.limit(70) == 64, "the largest, though fewer than three quarters end"
    assert KNOWN.limit(50) is None, "too few end within 48 tokens"
    assert Lengths([3, 4]).limit(20) == 20


def test_what_hardly_ever_ends_gets_no_long_limit():
    assert Lengths([], running=12, sampled=600).limit(1024) is None
    assert Lengths([100], running=11, sampled=1024).limit(1024) is None
    assert Lengths([100, 101, 102], running=90, sampled=400).limit(1024) is None


@pytest.mark.parametrize(("sampled", "limit"), [(0, 256), (30, 256), (128, 256), (140, 384), (300, 512), (511, 512)])
def test_what_was_not_sampled_for_long_gets_a_guess(sampled, limit):
    found = Lengths([20, 21], running=10, sampled=sampled)
    assert found.is_guess
    assert found.limit(1024) == limit
    assert found.limit(200) == 192
    assert found.described(limit, 1024) == [
        f"limit of a completion: {limit} tokens; what it cuts off is not known: 2 of 12 sampled completions had ended "
        f"after {sampled} tokens, where sampling was stopped; if that is much, raise `max_new_tokens` in the recipe"
    ]


def test_beyond_what_was_sampled_ends_are_as_likely_as_before():
    """Completions that end with probability 1/200 per token, of which 100 tokens are seen."""
    draw = random.Random(3)
    whole = [1 + int(draw.expovariate(1 / 200)) for _ in range(4000)]
    seen = sorted(length for length in whole if length <= 100)
    found = Lengths(seen, running=len(whole) - len(seen), sampled=100)
    for limit in (50, 100, 300, 600):
        assert found.share_ended(limit) == pytest.approx(sum(n <= limit for n in whole) / len(whole), abs=0.03)
    assert [found.is_estimate(limit) for limit in (100, 101)] == [False, True]
    assert found.limit(1024) == 384
    assert found.mean_tokens(384) == pytest.approx(sum(min(n, 384) for n in whole) / len(whole), rel=0.05)


def test_the_mean_length_is_that_of_what_is_kept():
    assert KNOWN.mean_tokens(1000) == pytest.approx(65)
    assert KNOWN.mean_tokens(40) == pytest.approx((10 + 20 + 30 + 7 * 40) / 10)


def test_what_is_said_of_a_limit():
    first, second = KNOWN.described(96, 1024)
    assert first == "limit of a completion: 96 tokens; 10% of 10 sampled completions are cut off"
    assert second.startswith("a limit of 192 would cut off about 10%, and completions would take about 18% more tokens")
    assert Lengths([5, 6, 7]).described(32, 1024) == [
        "limit of a completion: 32 tokens; 0% of 3 sampled completions are cut off"
    ]
    assert "a limit of 100 " in KNOWN.described(96, 100)[1]
    (said, _) = Lengths([50, 70, 90], running=1, sampled=100).described(128, 1024)
    assert said == (
        "limit of a completion: 128 tokens; about 19% of 4 sampled completions are cut off (1 had not ended after 100 "
        "tokens, where sampling was stopped)"
    )


def test_what_a_limit_cuts_off_is_known_of_all_that_was_sampled():
    """Too few ended to tell how long completions are, and all the same that most exceed a limit."""
    found = Lengths([20, 21], running=10, sampled=130)
    assert [found.tells(limit) for limit in (100, 130, 131)] == [True, True, False]
    (said,) = found.described(100, 1024)
    assert said == "limit of a completion: 100 tokens; 83% of 12 sampled completions are cut off"
    assert [found.cuts_most(limit) for limit in (100, 131)] == [True, False]
