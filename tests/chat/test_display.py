"""Replies on the screen: columns where there is room, safe text, metrics below each reply."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.cells import cell_len
from rich.console import Console

from rlhf_cli.chat.conversation import Reply
from rlhf_cli.chat.display import Display, metrics
from rlhf_cli.generation.generator import Completion

TEXTS = {"base": "word " * 40, "sft": "An reply.\n\nIn two parts.", "ppo": "\x1b[2Jcleared \u202e"}


def reply(name: str, **changes) -> Reply:
    return Reply(name, Completion([1] * 12, TEXTS[name], True), reward=0.5, **changes)


def shown(width: int, *, terminal: bool = False) -> str:
    file = io.StringIO()
    display = Display(Console(file=file, width=width, height=24, force_terminal=terminal), list(TEXTS))
    with display.turn():
        for name in TEXTS:
            told = display.show(SimpleNamespace(name=name))
            told(TEXTS[name][:5])
            display.finish(reply(name))
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_lines_fit_the_terminal_and_control_characters_are_visible(width):
    text = shown(width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "\\x1b[2Jcleared <U+202E>" in text.replace("\n", "")
    assert text.count("reward +0.50") == 3


def test_answers_are_side_by_side_where_there_is_room():
    assert shown(120).splitlines()[0].split() == ["base", "sft", "ppo"]
    assert shown(80).splitlines()[0].split() == ["base"]


def test_a_terminal_shows_an_answer_while_it_is_written():
    assert "\x1b[" in shown(120, terminal=True)


def test_figures():
    assert metrics(reply("sft")) == "reward +0.50 · 12 tokens"
    assert metrics(reply("ppo", kl=-0.26, reference="sft")) == "reward +0.50 · log-ratio to sft -0.3 nats · 12 tokens"
    cut = Reply("sft", Completion([1], "x", False))
    assert metrics(cut) == "1 token · cut at the limit"
