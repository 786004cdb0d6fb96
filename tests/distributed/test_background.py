"""A command in the background: it has the terminal until it hands it over, and nothing of it stays behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf_cli.distributed.background import BackgroundCommand
from rlhf_cli.errors import DiskError, ProcessDiedError, ReportedError

PROGRAM = """
import os, signal, sys, time
from rlhf_cli.distributed.worker import Worker, hand_over, is_background
from rlhf_cli.errors import DiskError
worker = Worker.adopt()
def report(error):
    print("error:", error, file=sys.stderr)
    return {"exit_code": 74, "message": str(error)}
def stopped(signum, frame):
    open("stopped", "w").close()
    sys.exit(143)
def await_file(name):
    while not os.path.exists(name):
        time.sleep(0.01)
signal.signal(signal.SIGTERM, stopped)
assert is_background()
"""
SHOWN, HIDDEN = 'print("shown", file=sys.stderr)\n', 'print("hidden", file=sys.stderr); print("hidden")\n'


def command(*lines: str) -> Sequence[str]:
    return [sys.executable, "-c", PROGRAM + "".join(lines)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def background(*lines: str) -> BackgroundCommand:
    return BackgroundCommand(command(*lines), Path("log.txt"))


def test_it_writes_to_the_terminal_until_it_hands_it_over(capfd):
    with background(SHOWN, 'hand_over(store="a.sqlite")\n', HIDDEN, "sys.exit(76)") as running:
        assert running.wait() == {"store": "a.sqlite"}
        running.finish()
        running.check()
        assert not running.is_running
        assert not running.has_failed.is_set()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "shown\n")


def test_all_done_without_a_need_for_the_terminal():
    with background() as running:
        assert running.wait() is None


def test_an_error_is_reported_as_the_command_would_and_logged(capfd):
    with background('hand_over()\nawait_file("go")\nworker.fail(DiskError("full"), report)') as running:
        assert running.wait() == {}
        assert running.is_running
        Path("go").touch()
        assert running.has_failed.wait(30)
        with pytest.raises(ReportedError) as raised:
            running.check()
    assert raised.value.exit_code == 74
    assert raised.value.plain == {"exit_code": 74, "message": "full"}
    assert "error: full" in capfd.readouterr().err
    assert "error: full" in Path("log.txt").read_text()


def test_an_error_before_the_terminal_was_handed_over_is_raised_while_waiting():
    with background('worker.fail(DiskError("full"), report)') as running, pytest.raises(ReportedError):
        running.wait()
    assert DiskError.exit_code == 74


def test_a_process_that_the_system_kills_is_named_with_what_it_said_last(capfd):
    lines = 'hand_over()\nos.write(2, b"last words\\n")\nos.kill(os.getpid(), signal.SIGKILL)'
    with background(lines) as running:
        running.wait()
        assert running.has_failed.wait(30)
        with pytest.raises(ProcessDiedError, match="killed by SIGKILL") as raised:
            running.check()
    assert raised.value.exit_code == 137
    assert "memory" in str(raised.value.hint)
    assert "last words" in capfd.readouterr().err


def test_it_is_asked_to_stop_at_the_end_and_that_is_no_failure():
    with background("hand_over()\ntime.sleep(60)") as running:
        running.wait()
        running.stop()
        assert Path("stopped").exists()
        running.check()


def test_it_is_killed_if_it_does_not_stop(monkeypatch, capfd):
    monkeypatch.setattr("rlhf_cli.distributed.background.QUICK_STOP", 0.05)
    monkeypatch.setattr("rlhf_cli.distributed.background.LONGEST_STOP", 0.05)
    with background("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nhand_over()\ntime.sleep(60)") as running:
        running.wait()
    assert not running.is_running
    assert "waiting until sampling stops" in capfd.readouterr().err


def test_it_ends_when_the_process_that_started_it_is_killed():
    child = 'open("pid", "w").write(str(os.getpid()))\nhand_over()\ntime.sleep(60)'
    parent = "from pathlib import Path\nfrom rlhf_cli.distributed.background import BackgroundCommand\nimport time\n"
    parent += f"with BackgroundCommand({command(child)!r}, Path('log.txt')) as running:\n"
    parent += "    running.wait()\n    print('ready', flush=True)\n    time.sleep(60)\n"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    process.stdout.close()
    number, until = int(Path("pid").read_text()), time.monotonic() + 30
    while _is_there(number):
        assert time.monotonic() < until, "an orphan goes on sampling and holds the run directory"
        time.sleep(0.02)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_before_reaches_it_once(signum):
    child = "signal.signal(signal.SIGINT, stopped)\nprint('begun', flush=True)\ntime.sleep(60)"
    parent = "from pathlib import Path\nfrom rlhf_cli.distributed.background import BackgroundCommand\nimport sys\n"
    parent += f"with BackgroundCommand({command(child)!r}, Path('log.txt')) as running:\n"
    parent += "    try:\n        running.wait()\n    except Exception as error:\n        sys.exit(error.exit_code)\n"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signum)
    assert process.wait(30) == 143
    process.stdout.close()
    assert Path("stopped").exists()


def _is_there(number: int) -> bool:
    """Whether a process runs; one that has ended stays in the table until init looks."""
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(number)], capture_output=True, text=True, check=False)
    return listed.stdout.strip()[:1] not in ("", "Z")
