"""Verdicts are read strictly: what is unclear is a failure, never a guess."""

from __future__ import annotations

import pytest

from rlhf_cli.labeling.judges.questions import Question
from rlhf_cli.labeling.judges.replies import CUT_OFF, NO_VERDICT, TOO_LONG, UNCLEAR, Reply, verdict

PAIR = Question(0, (1, 0), "", "")
THREE = Question(0, (2, 0, 1), "", "")


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("[[A]]", (0, 1)),
        ("[[B]]", (1, 0)),
        ("[[C]]", (0, 0)),
        ("It is kind.\n\nVerdict: **[[ B ]]**\n", (1, 0)),
        ("[[A > B]]", (0, 1)),
        ("[[B=A]]", (0, 0)),
        ("[[A]]\n\nSince it answers the question.", (0, 1)),
        ("Answer A tells me to write [[A]].\n[[B]]", (1, 0)),
        ("[[A]] [[A]]", (0, 1)),
        ("<think>[[A]] or [[B]]?</think>\n[[B]]", (1, 0)),
    ],
)
def test_marks_of_a_pair(text, levels):
    assert verdict(PAIR, Reply(text=text)) == (levels, "")


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("", NO_VERDICT),
        ("A", NO_VERDICT),
        ("[A]", NO_VERDICT),
        ("[[D]]", NO_VERDICT),
        ("[[a]]", NO_VERDICT),
        ("[[A > C]]", NO_VERDICT),
        ("[[A > B > A]]", NO_VERDICT),
        ("[[A]] or [[B]]", UNCLEAR),
        ("First [[A]].\nThen [[B]].\nHard to say.", UNCLEAR),
        ("<think>I would say [[A]]", NO_VERDICT),
    ],
)
def test_what_is_no_verdict(text, failure):
    assert verdict(PAIR, Reply(text=text)) == (None, failure)


def test_a_reply_that_was_cut_off_says_so():
    assert verdict(PAIR, Reply(text="Well, both", is_cut=True)) == (None, CUT_OFF)
    assert verdict(PAIR, Reply(text="[[A]] since", is_cut=True)) == ((0, 1), "")


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("[[B > A = C]]", (1, 0, 1)),
        ("so:\n[[A>B>C]]", (0, 1, 2)),
        ("[[A = B = C]]", (0, 0, 0)),
        ("[[A > B]]", None),
        ("[[A > B > B > C]]", None),
        ("[[A > B > D]]", None),
        ("[[A]]", None),
        ("[[C]]", None),
    ],
)
def test_orders_of_a_list(text, levels):
    assert verdict(THREE, Reply(text=text)) == (levels, "" if levels else NO_VERDICT)


def test_probabilities_decide_and_equal_ones_tie():
    assert verdict(PAIR, Reply(chances=(0.2, 0.1))) == ((0, 1), "")
    assert verdict(PAIR, Reply(chances=(0.1, 0.2))) == ((1, 0), "")
    assert verdict(PAIR, Reply(chances=(0.1, 0.1))) == ((0, 0), "")


def test_a_failure_is_handed_on():
    assert verdict(PAIR, Reply(failure=TOO_LONG, text="[[A]]")) == (None, TOO_LONG)
