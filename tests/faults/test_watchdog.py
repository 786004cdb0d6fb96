"""A process without progress ends with its own exit code and all stacks; a working one does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_cli.errors import EXIT_STALLED
from tests.faults.harness import ROOT, SmallRun

_BEGIN = """
import ctypes, re, threading, time
from rlhf_cli.progress import task
from rlhf_cli.distributed.watchdog import beat, waiting, watching

def hangs():
    with watching(0.4, "ppo"), task("sampling", 3) as bar:
"""
_END = """
hangs()
print("done")
"""


def start(*lines: str) -> subprocess.Popen[str]:
    script = _BEGIN + "".join(f"        {line}\n" for line in lines) + _END
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("time.sleep(100)", id="sleep"),
        pytest.param("ctypes.CDLL(None).sleep(100)", id="C code, as collectives wait"),
        pytest.param("lock = threading.Lock(); lock.acquire(); lock.acquire()", id="deadlock"),
        pytest.param("\n            while True: pass".join(["if True:", ""]), id="endless loop"),
    ],
)
def test_a_hang_ends_with_the_stacks_and_a_code_of_its_own(line):
    process = start(line)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == EXIT_STALLED == 124
    assert "in hangs" in stderr, "the stack of the thread that hangs"
    assert "error: `ppo` made no progress for 0.4 seconds (`stall_seconds`)" in stderr
    assert "hint: run the same command again" in stderr
    assert stdout == ""


def test_a_hang_that_keeps_the_interpreter_to_itself_ends_too():
    process = start('re.match("(a+)+b", "a" * 60)')
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "in hangs" in stderr


def test_progress_of_any_kind_keeps_it_alive():
    process = start(
        "for _ in range(6): time.sleep(0.1); bar.advance()",
        "for _ in range(6): time.sleep(0.1); beat()",
    )
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert stdout == "done\n"


def test_a_waiting_process_is_not_watched_until_it_works_again():
    process = start("with waiting(): time.sleep(1.2)", "print('waited', flush=True)", "time.sleep(100)")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == EXIT_STALLED, stderr
    assert stdout == "waited\n"


_TOGETHER = """
import time
import torch
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.watchdog import beat, watching

def works(rank):
    if processes.index == rank:
        for _ in range(25): time.sleep(0.1); beat()

def hangs(rank):
    if processes.index == rank:
        time.sleep(100)

processes = ProcessGroup()
processes.barrier()  # loading torch and meeting are not watched
with watching(1.0, "ppo"):
    for rank in (0, 1):
        works(rank)
        assert processes.all_gather_object(processes.index) == [0, 1]
        works(rank)
        processes.all_reduce([number := torch.ones(1)])
        assert number == 2
    hangs(1)
    processes.barrier()
"""
_SUPERVISE = """
import os, sys
from rlhf_cli.errors import ProcessDiedError
from rlhf_cli.distributed.supervisor import supervise
try:
    supervise([sys.executable, "-c", *sys.argv[1:]], 2, os.environ)
except ProcessDiedError as error:
    sys.exit(error.exit_code)
"""


def test_waiting_for_a_working_process_is_allowed_and_a_hanging_process_ends_both():
    end = subprocess.run(
        [sys.executable, "-c", _SUPERVISE, _TOGETHER],
        cwd=ROOT,
        env=os.environ | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert end.returncode == EXIT_STALLED, end.stderr
    assert "in hangs" in end.stderr, "not before, when each had waited for longer than the limit"
    assert "`ppo` made no progress for 1 seconds" in end.stderr


def test_nothing_is_watched_after_the_stage_or_without_the_setting():
    process = start("pass")
    assert process.communicate(timeout=60)[0] == "done\n"
    script = (
        "import time\nfrom rlhf_cli.distributed.watchdog import watching\nwith watching(None, 'ppo'): time.sleep(0.3)\n"
    )
    script += "with watching(0.1, 'ppo'): pass\ntime.sleep(0.6)\n"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def test_time_in_which_the_process_was_stopped_does_not_count():
    process = start("print('in', flush=True)", "for _ in range(5): time.sleep(0.1); bar.advance()")
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.7)  # below twice the time, behind which the interpreter's own timer would end it
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr


def test_a_hanging_reward_ends_the_command_and_the_run_resumes(halfway, expected, tmp_path: Path):
    run = halfway.copy(tmp_path / "hanging")
    hanging = SmallRun(run.folder, run.parts, {"stall_seconds": 5.0})
    # What is slow to load on a busy machine is loaded before the watch begins.
    end = hanging.run(
        before="import transformers, rlhf_cli.stages.ppo.run, rlhf_cli.stages.ppo.trainer", FAULT="hang:3"
    )
    assert end.code == EXIT_STALLED
    assert "in score" in end.stderr
    assert "`ppo` made no progress for 5 seconds" in end.stderr
    end = run.run_here(FAULT="signal:4")
    assert end.code == 143, end.stderr
    assert run.stopped() == expected
