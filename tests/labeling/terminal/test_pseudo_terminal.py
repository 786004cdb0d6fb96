"""The real program in a real pseudo-terminal: what is typed is what is stored, however it ends."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from rlhf_cli.data.records import Candidates
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import COMPLETION_LETTERS, Entry
from tests.labeling.terminal.terminal_support import PROGRAM, Terminal


@pytest.fixture
def store(tmp_path: Path) -> Path:
    session = LabelSession(tmp_path / "labels.db")
    items = [
        Candidates(f"Question {n}?", tuple(f"answer {n}.{k} \x1b[31m\u202e<b>" for k in range(4))) for n in range(20)
    ]
    session.prepare(LabelPlan(), items)
    session.close()
    return tmp_path / "labels.db"


@pytest.fixture
def started(store):
    terminals = []

    def start(**kwargs) -> Terminal:
        terminals.append(Terminal(store, **kwargs))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def labels_of(store: Path) -> dict[str, tuple]:
    """Prompt -> outcome, tiers by letter as shown, note and reason."""
    session = LabelSession(store, create=False)
    found = {}
    for label in session.labels():
        letters = {answer: COMPLETION_LETTERS[position] for position, answer in enumerate(label.shown)}
        tiers = tuple("".join(sorted(letters[answer] for answer in tier)) for tier in label.tiers)
        assert isinstance(label.prompt, str)
        found[label.prompt] = (label.outcome, tiers, label.note, label.reason)
    session.close()
    return found


def test_twenty_items_are_stored_exactly_as_they_were_typed(store, started):
    typed = {
        0: ("bacd\r", ("ranked", ("b", "a", "c", "d"), "", "")),
        1: ("d=cb=a\r", ("ranked", ("cd", "ab"), "", "")),
        2: ("a=b=c=d\r", ("ranked", ("abcd",), "", "")),
        3: ("s", ("skipped", (), "", "")),
        4: ("fnot English\r", ("flagged", (), "", "not English")),
        5: ("dnGrüße, 日本\rcba\r", ("ranked", ("d", "c", "b", "a"), "Grüße, 日本", "")),
        6: ("abx\x7fcdb\r", ("ranked", ("a", "c", "d", "b"), "", "")),
        7: ("\x1b[B\x1b[6~ \x1bOAcbad\r", ("ranked", ("c", "b", "a", "d"), "", "")),
        8: ("\x1b[200~abcd\r\x1b[201~\x1b[<0;3;4Mdcab\r", ("ranked", ("d", "c", "a", "b"), "", "")),
        9: ("n\x1b[200~from\nelsewhere\x1b[201~\rb=dac\r", ("ranked", ("bd", "a", "c"), "from elsewhere", "")),
    }
    typed |= dict.fromkeys(range(10, 20), ("dc=ba\r", ("ranked", ("d", "bc", "a"), "", "")))
    terminal = started()
    for number in range(10):
        terminal.wait_for(f"Question {number}?")
        terminal.type(typed[number][0])
    terminal.wait_for("Question 10?")
    terminal.type("uu", then="Question 8?")  # back twice
    terminal.wait_for("d > c > a > b")
    terminal.type("a=b=cd\r", then="Question 9?")  # and changed
    terminal.type("\r", then="Question 10?")
    typed[8] = ("", ("ranked", ("abc", "d"), "", ""))
    terminal.type("dc=", then="d > c = _")
    terminal.type("\x03")  # in the middle
    assert terminal.ended() == "outcome quit None\n"
    assert "you ranked 8, skipped 1, flagged 1 and undid 2" in str(terminal.screen)
    assert "to continue with" not in str(terminal.screen), "whoever called says that, with how far all is"

    terminal = started(columns=120, rows=40)
    terminal.wait_for("resumed your draft")
    terminal.type("=ba\r")
    for number in range(11, 20):
        terminal.wait_for(f"Question {number}?")
        terminal.type(typed[number][0])
    terminal.wait_for("Labeling is complete")
    terminal.type("\r")
    assert terminal.ended() == "outcome nothing left None\n"
    assert labels_of(store) == {f"Question {number}?": expected for number, (_, expected) in typed.items()}


def test_text_of_answers_is_shown_and_not_obeyed_and_a_new_size_is_drawn(started):
    terminal = started()
    terminal.wait_for("answer 0.3")
    assert "\\x1b[31m<U+202E><b>" in str(terminal.screen)
    assert "│" not in str(terminal.screen)
    terminal.resize(120, 40)
    terminal.wait_for("│")
    terminal.type("q")
    terminal.ended()


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_draft_and_restores_the_terminal(store, started, signum):
    terminal = started()
    terminal.wait_for("Question 0?")
    terminal.type("b=a", then="b = a")
    terminal.process.send_signal(signum)
    assert terminal.ended() == f"outcome signal {int(signum)}\n"
    assert LabelSession(store, create=False).task(1, 1).draft == Entry(((0, 1),))


def test_under_nohup_a_hangup_is_not_obeyed(store, started):
    terminal = started(ignored=(signal.SIGHUP,))
    terminal.wait_for("Question 0?")
    terminal.type("b=a", then="b = a")
    terminal.process.send_signal(signal.SIGHUP)
    terminal.type("c", then="b = a > c")
    terminal.type("q")
    assert terminal.ended() == "outcome quit None\n"


def test_a_closed_window_keeps_the_draft(store, started):
    terminal = started()
    terminal.wait_for("Question 0?")
    terminal.type("c=d", then="c = d")
    terminal.hang_up()
    assert terminal.process.wait(15) == 0
    assert LabelSession(store, create=False).task(1, 1).draft == Entry(((2, 3),))


def test_an_error_of_ours_restores_the_terminal_before_it_is_shown(store, started):
    broken = "import rlhf_cli.labeling.terminal.app as app\n"
    broken += "real, calls = app.draw, []\n"
    broken += "def draw(*args):\n    calls.append(1)\n    return real(*args) if len(calls) < 3 else 1 / 0\n"
    broken += "app.draw = draw\n"
    terminal = started(program=broken + PROGRAM)
    terminal.wait_for("Question 0?")
    terminal.type("b", then="ranking  b")
    terminal.type("a")
    terminal.ended()
    assert terminal.process.returncode == 1
    assert "ZeroDivisionError" in str(terminal.screen)
    assert LabelSession(store, create=False).task(1, 1).draft == Entry(((1,), (0,)))


def test_stopped_and_continued_it_draws_anew(store, started):
    terminal = started()
    terminal.wait_for("Question 0?")
    terminal.type("b", then="ranking  b")
    terminal.process.send_signal(signal.SIGSTOP)
    terminal.screen.rows = {}
    terminal.process.send_signal(signal.SIGCONT)
    terminal.wait_for("ranking  b")
    terminal.type("\x1a")  # Ctrl-Z; a session without a shell is not stopped, but the terminal is given back and taken
    time.sleep(0.2)
    terminal.type("a", then="b > a")
    terminal.type("q")
    terminal.ended()
    assert LabelSession(store, create=False).task(1, 1).draft == Entry(((1,), (0,)))
