"""What a user reads after a request to stop: the words fit the signal, and what was saved."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from rlhf_cli.distributed.signals import SignalStop
from rlhf_cli.errors import Interrupted


@pytest.mark.parametrize(
    ("signum", "text"),
    [
        (signal.SIGINT, "SIGINT: stopping after step 3; Ctrl-C again stops at once"),
        (signal.SIGTERM, "SIGTERM: stopping after step 3; SIGINT (Ctrl-C) stops at once"),
        (signal.SIGUSR1, "SIGUSR1: stopping after step 3; SIGINT (Ctrl-C) stops at once"),
    ],
)
def test_the_way_to_stop_at_once_fits_the_signal(signum: signal.Signals, text: str, capfd):
    with SignalStop(lambda: "step 3"):
        signal.raise_signal(signum)
    assert text in capfd.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("saves", "message", "hint"),
    [
        (False, "stopped by SIGTERM; there was nothing to save", "run the same command again"),
        (True, "stopped by SIGTERM; finished steps and batches are saved", "to resume from the last of them"),
    ],
)
def test_only_work_that_began_is_said_to_be_saved(saves: bool, message: str, hint: str):
    with SignalStop(saves=lambda: saves) as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            stop.check()
    assert caught.value.message == message
    assert (caught.value.hint or "").endswith(hint)


def test_work_has_begun_once_a_task_that_saves_has():
    program = """
from rlhf_cli.progress import task
from rlhf_cli.running_tasks import has_begun
found = []
for saves in (False, True):
    with task("training", 1, saves=saves):
        found.append(has_begun())
print(*found, has_begun())
"""
    # In a process of its own: tests before this one ran tasks here.
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout.split() == ["False", "True", "True"]
