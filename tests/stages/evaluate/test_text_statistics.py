"""Figures of texts, and texts made safe for a terminal."""

from __future__ import annotations

import pytest

from rlhf_cli.stages.evaluate.text_statistics import (
    Phrase,
    distinct,
    most_common_share,
    phrases,
    printable,
    repeated_share,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("\x1b[31mred\x1b[0m", "red", id="color"),
        pytest.param("a\x1b]0;title\x07b", "ab", id="window title"),
        pytest.param("a\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "alink", id="hyperlink"),
        pytest.param("a\x1bPpayload\x1b\\b", "ab", id="device control string"),
        pytest.param("a\x1b[2Jb\x1bc", "abc", id="clear screen; a lone escape goes, its letter stays"),
        pytest.param("a\rb\x08\x07\x00\x9b31m", "ab31m", id="control characters"),
        pytest.param("left\u202eright\u2066", "leftright", id="direction marks"),
        pytest.param("a\r\nb\tc", "a\nb\tc", id="line ends and tabs stay"),
        pytest.param("naïve 日本 🙂", "naïve 日本 🙂", id="letters stay"),
    ],
)
def test_nothing_is_left_that_a_terminal_would_obey(text, expected):
    assert printable(text) == expected
    assert "\x1b" not in printable(text)


def test_most_common_share():
    assert most_common_share(["Yes.", " yes. ", "no"]) == pytest.approx(2 / 3)
    assert most_common_share([]) == 0.0


def test_distinct_pairs_of_words():
    assert distinct(["a b c", "a b d"], 2) == pytest.approx(3 / 4)  # ab bc ab bd
    assert distinct(["one"], 2) == 0.0


def test_the_most_common_phrases_of_both_are_compared():
    before = ["Well then we go home now.", "Well then we stay.", "No."]
    after = ["Thank you for this. Be well my friend!", "thank  you for that. Be well my friend!", "No.", "Yes."]
    found = phrases(before, after)
    assert found.openings == (Phrase("thank you for", 0.0, 0.5), Phrase("well then we", 2 / 3, 0.0))
    assert found.endings == (Phrase("well my friend!", 0.0, 0.5),)
    assert phrases([""], [""]).openings == ()


def test_at_most_three_phrases_of_each_are_compared_in_a_fixed_order():
    texts = [f"{word} is it." for word in "zyxwv" for _ in range(2)]
    assert [one.text for one in phrases(texts, texts).openings] == ["v is it.", "w is it.", "x is it."]


def test_repeated_four_grams():
    assert repeated_share(["a b c d a b c d", "a b c d"], 4) == pytest.approx((1 / 5 + 0) / 2)
    assert repeated_share(["too short"], 4) == 0.0
