"""What is typed while a reply is being written is read by the next turn, and does not disturb the reply."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from tests.terminals import Terminal, screen_of


@pytest.fixture
def chat():
    """A chat with a slow model, after the first question, which is being replied to."""
    terminal = Terminal(100, str(Path(__file__).with_name("slow_chat.py")), program=sys.executable)
    terminal.until(r"slow reply.*\n> ")
    terminal.type("first\n")
    terminal.until("word3")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()


def reply_to(terminal: Terminal, question: str) -> list[str]:
    """Lines of the screen when the reply to a question is there, and the prompt below it."""
    terminal.until(rf"end of the reply to <{re.escape(question)}>[\s\S]*1 token[\s\S]*\n> ")
    return screen_of(terminal.raw, 100)


def test_a_line_begun_during_a_reply_is_the_beginning_of_the_next_question(chat):
    chat.type("second")
    lines = reply_to(chat, "first")
    assert sum("second" in line for line in lines) <= 1, "it may be on the line of the prompt alone"
    chat.type(" part\n")
    lines = reply_to(chat, "second part")
    assert "> second part" in lines


def test_a_line_ended_during_a_reply_is_the_next_question(chat):
    chat.type("another\n")
    before, _, _ = chat.until(r"end of the reply to <first>[\s\S]*1 token").partition("1 token")
    assert "another" not in before
    lines = reply_to(chat, "another")
    assert "> another" in lines
    assert sum(line.startswith("word0 word1") for line in lines) == 2, "no reply was torn"


def test_the_terminal_shows_what_is_typed_again_after_an_interruption(chat):
    chat.process.send_signal(signal.SIGINT)
    chat.until(r"stopped[\s\S]*\n> ")
    chat.type("after it\n")
    assert "> after it" in reply_to(chat, "after it")
