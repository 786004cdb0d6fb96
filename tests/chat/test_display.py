"""Replies on the screen: columns where there is room, safe text, metrics below each reply."""

from __future__ import annotations

import io
import time

import pytest
from rich.cells import cell_len
from rich.console import Console

from rlhf_cli.chat.conversation import Reply
from rlhf_cli.chat.display import Display, metrics
from rlhf_cli.generation.generator import Completion

TEXTS = {"base": "word " * 40, "sft": "A reply.\n\nIn two parts.", "ppo": "\x1b[2Jcleared \u202e"}


def reply(name: str, **changes) -> Reply:
    return Reply(name, Completion([1] * 12, TEXTS[name], True), reward=0.5, **changes)


def shown(width: int, *, terminal: bool = False) -> str:
    file = io.StringIO()
    display = Display(Console(file=file, width=width, height=24, force_terminal=terminal), list(TEXTS))
    with display.turn():
        for name in TEXTS:
            display.show(name, TEXTS[name][:5])
        for name in TEXTS:
            display.finish(reply(name))
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_lines_fit_the_terminal_and_control_characters_are_visible(width):
    text = shown(width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "\\x1b[2Jcleared <U+202E>" in text.replace("\n", "")
    assert text.count("reward +0.50") == 3


def test_replies_are_side_by_side_from_100_columns_on():
    assert shown(120).splitlines()[0].split() == shown(100).splitlines()[0].split() == ["base", "sft", "ppo"]
    below = shown(99).splitlines()
    assert [line for line in below if line in TEXTS] == ["base", "sft", "ppo"]
    assert below[below.index("sft") - 1] == "", "with a line between"


def test_long_names_are_wrapped_and_shown_whole():
    names = ["organization/a-model-with-a-very-long-name-indeed", "runs/mine/ppo/steps/4"]
    for width in (40, 100):
        file = io.StringIO()
        display = Display(Console(file=file, width=width, height=24), names)
        with display.turn():
            for name in names:
                display.show(name, "x")
        rows = file.getvalue().splitlines()
        assert max(map(cell_len, rows)) <= width
        left = "".join(row[: (width - 3) // 2 if width == 100 else width].strip() for row in rows)
        assert names[0] in left
        assert any(names[1] in row for row in rows)


def test_a_terminal_shows_all_replies_while_they_are_written():
    file = io.StringIO()
    display = Display(Console(file=file, width=120, height=24, force_terminal=True), list(TEXTS))
    with display.turn():
        display.show("base", "first words")
        assert "first words" in file.getvalue()
        assert "ppo" in file.getvalue()


def test_nothing_is_shown_of_a_turn_without_replies():
    file = io.StringIO()
    with Display(Console(file=file, width=80), list(TEXTS)).turn():
        pass
    assert file.getvalue() == ""


@pytest.mark.parametrize("width", [80, 120])
def test_the_picture_while_they_write_fits_the_screen(width):
    file = io.StringIO()
    console = Console(file=file, width=width, height=12, force_terminal=True, color_system=None)
    display = Display(console, list(TEXTS))
    with display.turn():
        for name in TEXTS:
            time.sleep(0.1)  # it is not drawn more often
            display.show(name, "word " * 900)
        drawn = file.getvalue().split("\x1b[2K")[-1]
    assert len(drawn.splitlines()) <= 12


def test_figures():
    assert metrics(reply("sft")) == "reward +0.50 · 12 tokens"
    assert metrics(reply("ppo", kl=-0.26, reference="sft")) == "reward +0.50 · log-ratio to sft -0.3 nats · 12 tokens"
    cut = Reply("sft", Completion([1], "x", False))
    assert metrics(cut) == "1 token · cut at the limit"
