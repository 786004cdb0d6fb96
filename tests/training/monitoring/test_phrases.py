"""Phrases that completions share, and repetition, by hand."""

from __future__ import annotations

import pytest

from rlhf_cli.training.monitoring.detectors.phrases import (
    END,
    START,
    as_text,
    longest_shared,
    phrase_uses,
    phrases_of,
    repeated_share,
    rise,
    words_of,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Good luck!", ["good", "luck", "!"]),
        ("It's  fine,\nreally...", ["it's", "fine", ",", "really", ".", ".", "."]),
        ("\u4f60\u597d\u3002", ["\u4f60", "\u597d", "\u3002"]),
        ("", []),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


def test_the_ends_of_a_completion_are_words_so_that_short_ones_have_phrases():
    assert phrases_of("Yes") == {(START, "yes", END)}
    assert phrases_of("Good luck!") == {(START, "good", "luck"), ("good", "luck", "!"), ("luck", "!", END)}


def test_a_use_counts_prompts_completions_and_what_they_gain():
    texts = ["good luck!", "good luck!", "oh good luck!", "other words here"]
    uses = phrase_uses(["a", "a", "b", "c"], texts, [3.0, 1.0, 2.0, -2.0])
    use = uses[("good", "luck", "!")]
    assert (use.share, use.count) == (pytest.approx(2 / 3), 3)
    assert use.excess == pytest.approx(3.0)  # 2 + 0 + 1, of rewards with mean 1
    assert (START, "good", "luck") not in uses  # of one prompt alone, however often


def test_a_rise_is_relative_to_what_was_left():
    assert rise(0.8, 0.2) == pytest.approx(0.75)
    assert rise(1.0, 0.9) == pytest.approx(0.2)  # a tenth, of a half
    assert rise(0.1, 0.4) < 0


def test_a_phrase_is_told_as_far_as_the_completions_agree():
    texts = ["Well, good luck with that, friend.", "Good luck with that, friend!", "good luck with that one"]
    assert longest_shared(("good", "luck", "with"), texts, share=0.9) == ("good", "luck", "with", "that")
    assert longest_shared(("luck", "with", "that"), texts, share=0.9) == ("good", "luck", "with", "that")
    whole = longest_shared(("good", "luck", "with"), texts[:2], share=0.9)
    assert as_text(whole) == "good luck with that, friend"
    assert as_text((START, "yes", END)) == "yes"
    assert longest_shared((START, "x", END), ["x"]) == (START, "x", END)


def test_repetition():
    assert repeated_share("a b c d") == 0.0
    assert repeated_share("a b c") == 0.0
    # 9 sequences of four words, of which abca, bcab and cabc are different.
    assert repeated_share("a b c a b c a b c a b c") == pytest.approx(6 / 9)
