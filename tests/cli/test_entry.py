"""The end of the installed command: exit functions run, Python's teardown does not once torch is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

COMMAND = """
import atexit, builtins, sys, threading, types
from rlhf_cli import cli

class Noticed:
    def __del__(self, write=print): write("teardown")

builtins.noticed = Noticed()  # goes with the interpreter
atexit.register(print, "exit function", flush=True)
cli.main = lambda: 7
"""
TORCH = "sys.modules['torch'] = types.ModuleType('torch')\n"
DAEMON = "threading.Thread(target=lambda: __import__('time').sleep(60), daemon=True).start()\n"
STOPPED = "def main(): sys.exit(7)\ncli.main = main\n"
THREAD = "threading.Thread(target=lambda: None if not noticed else __import__('time').sleep(0.3)).start()\n"


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (TORCH, ["exit function"]),
        (TORCH + DAEMON + STOPPED, ["exit function"]),
        ("", ["exit function", "teardown"]),
        (TORCH + THREAD, ["exit function", "teardown"]),
    ],
    ids=["torch", "a signal while a model is loaded", "no torch", "a thread that works"],
)
def test_the_process_ends_without_teardown_once_torch_is_loaded(before, said):
    found = subprocess.run([sys.executable, "-c", COMMAND + before + "cli.entry()"], capture_output=True, text=True)
    assert (found.stdout.splitlines(), found.stderr) == (said, "")
    assert found.returncode == 7
