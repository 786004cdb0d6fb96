"""Texts of models on a page: visible, bounded, with their differences marked."""

from __future__ import annotations

from rlhf_cli.report.texts import LONGEST, shortened, side_by_side, visible


def joined(pieces, *marks) -> str:
    return "".join(text for mark, text in pieces if mark in marks)


def test_differences_are_those_of_words():
    first, second = side_by_side("The cat sat down.", "The dog sat down quietly.")
    assert joined(first, "", "del") == "The cat sat down."
    assert joined(second, "", "ins") == "The dog sat down quietly."
    assert [text for mark, text in first if mark == "del"] == ["cat", "down."]
    assert [text for mark, text in second if mark == "ins"] == ["dog", "down quietly."]


def test_control_and_bidirectional_characters_are_visible():
    assert visible("a\x1b[31m\u202eb\n\tc") == "a\\x1b[31m<U+202E>b\n    c"


def test_long_texts_are_cut_and_it_is_said():
    text, rest = shortened("x" * 100_000)
    assert len(text) == LONGEST
    assert rest == " … 98,500 more characters"
    first, second = side_by_side("a " * 50_000, "b")
    assert first[-1] == ("em", " … 98,500 more characters")
    assert joined(second, "", "ins") == "b"


def test_an_empty_text_is_named():
    first, second = side_by_side("", " \n")
    assert first == second == [("em", "(empty)")]
