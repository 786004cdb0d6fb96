"""Keys from bytes: however they arrive, nothing that is no key becomes a letter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.labeling.terminal.editing import Line
from rlhf_cli.labeling.terminal.keys import ESCAPE_SECONDS, PASTE_SECONDS, Key, KeyReader

SEQUENCES = {
    b"\x1b[A": Key("up"),
    b"\x1bOB": Key("down"),
    b"\x1b[1;5C": Key("right"),
    b"\x1b[5~": Key("pageup"),
    b"\x1b[6~": Key("pagedown"),
    b"\x1b[H": Key("home"),
    b"\x1b[4~": Key("end"),
    b"\x1b[Z": Key("backtab"),
    b"\x1b[3~": Key("delete"),
    b"\x1b[15~": Key("unknown"),
    b"\x1b[[A": Key("unknown"),
    b"\x1b[98;5u": Key("unknown"),
    b"\x1bb": Key("unknown"),
    "\x1bé".encode(): Key("unknown"),
    b"\x1b[<0;12;7M": None,
    b"\x1b[<0;12;7m": None,
    b"\x1b[M abc"[:6]: None,
    b"\x1b[32;4;5M": None,
    b"\x1b[I": None,
    b"\x1b[O": None,
    b"\x1b[?62;c": None,
    b"\x1b]11;rgb:aa/bb/cc\x07": None,
    b"\x1bPabc\x1b\\": None,
    b"\x1b[200~b=a c\r\x1b[A\x1b[201~": Key("paste", "b=a c\r\x1b[A"),
    b"\r": Key("enter"),
    b"\n": Key("enter"),
    b"\x7f": Key("backspace"),
    b"\x08": Key("backspace"),
    b"\t": Key("tab"),
    b"\x03": Key("control", "c"),
    b"b": Key("text", "b"),
    "日".encode(): Key("text", "日"),
}


def read(parts: list[bytes]) -> list[Key]:
    reader = KeyReader()
    return [key for part in parts for key in reader.feed(part)]


@pytest.mark.parametrize("sequence", SEQUENCES, ids=repr)
def test_each_sequence_is_one_key_or_none(sequence):
    expected = [Key("text", "x"), *([SEQUENCES[sequence]] if SEQUENCES[sequence] else []), Key("text", "y")]
    assert read([b"x" + sequence + b"y"]) == expected


@given(st.lists(st.sampled_from(list(SEQUENCES)), max_size=8), st.data())
def test_parts_of_any_size_are_read_as_the_whole(sequences, data):
    whole = b"".join(sequences)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    parts = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert read(parts) == [SEQUENCES[sequence] for sequence in sequences if SEQUENCES[sequence]]


@given(st.binary(max_size=60))
def test_any_bytes_are_read_and_ctrl_c_gets_through(received):
    reader = KeyReader()
    reader.feed(received)
    if not received.rfind(b"\x1b[200~") >= 0:  # a paste ends after a while
        after = [key for _ in range(4) for key in reader.feed(b"\x03")]  # three may be coordinates of a mouse
        assert Key("control", "c") in after


def test_a_lone_escape_is_a_key_after_a_while_and_the_rest_of_a_sequence_still_no_letter():
    reader = KeyReader()
    assert reader.feed(b"\x1b") == []
    assert reader.expire(ESCAPE_SECONDS / 2) == []
    assert reader.expire(ESCAPE_SECONDS) == [Key("escape")]
    assert reader.feed(b"[") == []
    assert reader.expire(9.0) == []
    assert reader.feed(b"Ab") == [Key("up"), Key("text", "b")]
    assert reader.feed(b"\x1b") + reader.expire(1.0) + reader.feed(b"O") + reader.feed(b"C") == [
        Key("escape"),
        Key("right"),
    ]


def test_a_paste_without_an_end_is_over_after_a_while():
    reader = KeyReader()
    assert reader.feed(b"\x1b[200~abc") == []
    assert reader.expire(PASTE_SECONDS / 2) == []
    assert reader.expire(PASTE_SECONDS) == [Key("paste", "abc")]
    assert reader.feed(b"d") == [Key("text", "d")]


def typed(line: Line, *keys: Key, limit: int = 100) -> Line:
    for key in keys:
        line = line.pressed(key, limit) or line
    return line


def test_a_line_is_edited_as_in_a_shell():
    line = typed(Line(), *(Key("text", c) for c in "one two"))
    assert line == Line("one two", 7)
    assert typed(line, Key("control", "w")) == Line("one ", 4)
    assert typed(line, Key("home"), Key("delete"), Key("right"), Key("backspace")) == Line("e two", 0)
    assert typed(line, Key("left"), Key("left"), Key("left"), Key("control", "k")) == Line("one ", 4)
    assert typed(line, Key("left"), Key("control", "u")) == Line("o", 0)
    assert typed(line, Key("control", "a"), Key("text", "x"), Key("control", "e")) == Line("xone two", 8)
    assert line.pressed(Key("up"), 9) is None


def test_what_is_seen_as_one_is_moved_over_and_deleted_as_one():
    line = Line.of("a👩‍👩‍👧e\u0301")
    assert typed(line, Key("backspace")) == Line.of("a👩‍👩‍👧")
    assert typed(line, Key("left"), Key("left")).cursor == 1
    assert typed(line, Key("home"), Key("right"), Key("delete")) == Line("ae\u0301", 1)


def test_a_paste_goes_in_as_one_line_without_controls_and_no_longer_than_the_limit():
    assert typed(Line(), Key("paste", " a\r\nb\x1b[A\tc ")) == Line.of("a b [A c")
    assert typed(Line.of("12"), Key("paste", "3456"), limit=5) == Line.of("12345")
