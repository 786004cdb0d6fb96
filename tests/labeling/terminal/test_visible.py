"""Text of strangers as it is shown: nothing obeyed, nothing dropped, nothing wider than its room."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from rlhf_cli.labeling.terminal.visible import clusters, in_one_line
from rlhf_cli.labeling.terminal.wrapping import Piece, cut, flow, width_of, wrap
from tests.labeling.terminal.terminal_support import TEXTS


def rows(text: str, width: int) -> list[str]:
    return ["".join(piece.text for piece in row) for row in wrap(text, width)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("\x1b[31mred", "\\x1b[31mred", id="color"),
        pytest.param("a\x07b\x7fc\x00", "a\\x07b\\x7fc\\x00", id="controls"),
        pytest.param("\x9b2J", "\\x9b2J", id="the one-byte escape"),
        pytest.param("\u202eevil\u202c", "<U+202E>evil<U+202C>", id="turned round"),
        pytest.param("\u061c\u200e\u2066", "<U+061C><U+200E><U+2066>", id="other directions"),
        pytest.param("a\u200bb\ufeff\u00ad", "a<U+200B>b<U+FEFF><U+00AD>", id="no width"),
        pytest.param("a\U000e0041\u3164\u2800", "a<U+E0041><U+3164><U+2800>", id="no ink"),
        pytest.param("a\ufe01\U000e0101x\ufe0f", "a<U+FE01><U+E0101>x<U+FE0F>", id="selectors that select nothing"),
        pytest.param("\u2028\u2029\x85", "<U+2028><U+2029>\\x85", id="other line ends"),
        pytest.param("\ud800", "<U+D800>", id="half a character"),
        pytest.param("a\u200db", "a<U+200D>b", id="a joiner that joins nothing"),
        pytest.param("👩‍👩‍👧 می‌خواهم ❤️ 1️⃣", "👩‍👩‍👧 می‌خواهم ❤️ 1️⃣", id="joiners and selectors at work"),
        pytest.param("\u0301x", "\u25cc\u0301x", id="a mark on nothing"),
        pytest.param("a\nb\tc\r", "a\\nb\\tc\\r", id="in one line"),
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_shown_by_its_code(text, shown):
    assert in_one_line(text) == shown


@given(TEXTS)
def test_shown_text_holds_nothing_that_moves_turns_or_hides(text):
    for character in in_one_line(text):
        assert unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")
        assert character in "\u200c\u200d" or unicodedata.category(character) != "Cf"


@given(TEXTS)
def test_shown_text_shown_again_is_the_same(text):
    assert in_one_line(in_one_line(text)) == in_one_line(text)


@given(TEXTS)
def test_clusters_stand_for_all_characters_of_a_text(text):
    assert sum(part.length for part in clusters(text)) == len(text)


@given(TEXTS, st.integers(8, 90))
def test_no_row_is_wider_than_its_room(text, width):
    for row in rows(text, width):
        assert cell_len(row) <= width_of(row) <= width


@given(TEXTS, st.integers(8, 90))
def test_rows_together_show_all_of_a_text(text, width):
    def inked(shown):
        return shown.replace(" ", "").replace("\u25cc", "")

    expected = "".join(in_one_line(line.expandtabs(4)) for line in text.replace("\r\n", "\n").split("\n"))
    assert inked("".join(rows(text, width))) == inked(expected)


def test_words_stay_whole_and_lines_and_indentation_stay():
    code = "def f(items):\n    # goes on and on here\n    return items"
    assert rows(code, 20) == ["def f(items):", "    # goes on and on", "        here", "    return items"]
    assert rows("\tx\r\n\n y", 20) == ["    x", "", " y"]
    assert rows("a" * 20 + " b", 12) == ["a" * 12, "a" * 8 + " b"]


def test_wide_text_breaks_anywhere_but_before_a_full_stop():
    assert rows("日本語の文章。次", 12) == ["日本語の文", "章。次"]


def test_a_text_is_cut_with_a_sign():
    assert cut("kitchen", 7) == "kitchen"
    assert cut("kitchens", 7) == "kitche…"
    assert cut("日本語", 5) == "日本…"
    assert cut("x", 0) == ""


@given(st.lists(st.text("abc日", min_size=1, max_size=12), max_size=9), st.integers(8, 40))
def test_pieces_flow_without_being_broken(texts, width):
    flowed = flow([Piece(text) for text in texts], width, " > ")
    assert all(width_of("".join(piece.text for piece in row)) <= width for row in flowed)
    assert [piece.text for row in flowed for piece in row if piece.text != " > "] == [cut(t, width) for t in texts]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30000))
def test_long_text_costs_little(size):
    assert len(rows("word " * size, 40)) <= size // 8 + 2
