"""What is typed is not shown while something is drawn, and is shown again afterwards, whatever the end."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
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


@pytest.fixture
def window() -> Iterator[tuple[int, int]]:
    """Both sides of a terminal: that of the person, and that of the program."""
    master, slave = pty.openpty()
    yield master, slave
    os.close(slave)
    os.close(master)


def read_until(master: int, word: bytes) -> bytes:
    shown, deadline = b"", time.monotonic() + 120
    while word not in shown:
        assert time.monotonic() < deadline, shown
        if select.select([master], [], [], 0.2)[0]:
            shown += os.read(master, 65536)
    return shown


WITHIN = """
import signal, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, also where these tests run under nohup
from rich.console import Console
from rich.live import Live
from rlhf_cli.echo import leaving_on_signals, without_echo
with leaving_on_signals(), Live("drawn", console=Console(stderr=True), screen=True), without_echo():
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_restores_echo_cursor_and_screen(window: tuple[int, int], signum: int):
    master, slave = window
    command = [sys.executable, "-c", WITHIN]
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen(command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
        read_until(master, b"ready")
        assert not shows_typed(slave)
        process.send_signal(signum)
        process.wait(timeout=60)
    assert process.returncode == 128 + signum
    assert shows_typed(slave)
    shown = read_until(master, b"\x1b[?1049l")
    assert b"\x1b[?25h" in shown


@pytest.mark.slow
def test_a_command_that_waits_for_a_line_leaves_the_terminal_as_it_was(window: tuple[int, int], tmp_path: Path):
    """Where a line is edited, the terminal is in another mode."""
    master, slave = window
    before = termios.tcgetattr(slave)
    command = [sys.executable, "-m", "rlhf_cli", "start"]
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
        read_until(master, b"> ")
        assert termios.tcgetattr(slave) != before
        wait_until_asleep(process.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert termios.tcgetattr(slave) == before


def wait_until_asleep(pid: int) -> None:
    """Wait until a process waits for a key: Python handles a signal just before that only after the next key."""
    status = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 60
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < deadline, "the process never waited for a key"
        time.sleep(0.05)
