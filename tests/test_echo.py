"""What is typed is not shown while something is drawn, and is shown again afterwards, whatever the end."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_cli import console
from rlhf_cli.console import working
from rlhf_cli.echo import restore_echo, without_echo
from rlhf_cli.errors import EXIT_STALLED

ROOT = Path(__file__).parents[1]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A terminal from which this process reads."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "r") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield slave
    os.close(master)


def shows_typed(terminal: int) -> bool:
    return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)


def test_typed_text_is_hidden_within_and_shown_after(terminal: int):
    def fail_within() -> None:
        with without_echo():
            with without_echo():
                assert not shows_typed(terminal)
            assert not shows_typed(terminal), "the inner one leaves it to the outer one"
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert shows_typed(terminal)
    with without_echo():
        restore_echo()
        assert shows_typed(terminal)
    with without_echo():
        assert not shows_typed(terminal), "again"
    assert shows_typed(terminal)


@pytest.mark.parametrize("is_main", [True, False])
def test_only_one_process_changes_the_terminal_of_all(terminal: int, monkeypatch: pytest.MonkeyPatch, is_main: bool):
    monkeypatch.setattr(console, "interactive", lambda: True)
    monkeypatch.setattr(console, "is_main", lambda: is_main)
    with working("loading ..."):
        assert shows_typed(terminal) == (not is_main)
    assert shows_typed(terminal)


@pytest.mark.slow
def test_a_process_that_the_watchdog_ends_restores_it():
    master, slave = pty.openpty()
    script = (
        "import time\nfrom rlhf_cli.distributed.watchdog import watching\nfrom rlhf_cli.echo import without_echo\n"
        "with watching(0.4, 'ppo'), without_echo():\n    print('in', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=slave, stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        assert not shows_typed(slave)
        process.communicate(timeout=60)
    assert process.returncode == EXIT_STALLED
    assert shows_typed(slave)
    os.close(slave)
    os.close(master)
