"""Run as a script: a supervisor with workers that do what their second argument says, without torch.

`supervised.py supervise MODE [N]` starts N workers; `supervised.py work MODE` is one of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rlhf_cli.cli.error_rendering import print_error, report
from rlhf_cli.distributed.signals import SignalStop
from rlhf_cli.distributed.supervisor import supervise
from rlhf_cli.distributed.worker import Worker
from rlhf_cli.errors import DivergedError, Interrupted, RunInUseError


def main() -> int:
    what, mode = sys.argv[1:3]
    if what == "work":
        return work(mode)
    try:
        supervise([sys.executable, __file__, "work", mode], int(sys.argv[3]), os.environ)
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
    return 0


def work(mode: str) -> int:
    worker = Worker.adopt()
    assert worker is not None
    rank = int(os.environ["RANK"])
    print(f"data of rank {rank}", flush=True)
    print(f"words of rank {rank}", file=sys.stderr, flush=True)
    try:
        play(mode, rank)
    except (Exception, KeyboardInterrupt) as error:
        worker.fail(error, lambda failure: print_error(failure).as_json())
    return 0


def play(mode: str, rank: int) -> None:
    if mode == "all diverge":
        time.sleep(0.1 * (2 - rank))
        raise DivergedError("loss was nan in 3 steps in a row")
    if mode == "takeover":  # rank 0 asks all to stop, and says why after the last upload
        time.sleep(0.5 * (1 - rank))
        raise Interrupted(signal.SIGTERM) if rank else RunInUseError("s3://bucket/run was taken over by node-b")
    if mode == "signals":
        listen(rank)
    elif mode == "step":
        finish_the_step(rank)
    elif mode == "pids":
        Path(f"{rank}.pid").write_text(str(os.getpid()))
        time.sleep(60)
    elif mode == "lost peer" and rank == 0:
        Path("0.lost").touch()
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4422")
    elif rank == 1:
        fail(mode)
    elif mode != "well":
        time.sleep(60)


def fail(mode: str) -> None:
    if mode == "raise":
        raise ValueError("only in rank 1")
    if mode.startswith("orphan"):
        Path("orphan.pid").write_text(str(subprocess.Popen(["sleep", "60"]).pid))
    if mode == "orphan, raise":
        raise ValueError("only in rank 1")
    if mode in ("kill", "orphan, kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "leave":
        os._exit(3)
    if mode == "lost peer":
        while not Path("0.lost").exists():
            time.sleep(0.02)
        time.sleep(0.5)  # the other notices before this one can say why
        raise ValueError("the cause")


def listen(rank: int) -> None:
    """Count signals, save at leisure, and leave as a stage does."""
    seen: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda number, frame: seen.append(number))
    Path(f"{rank}.listening").touch()
    while not seen:
        time.sleep(0.02)
    time.sleep(0.5 if rank == 0 else 0.2)
    Path(f"{rank}.seen").write_text(" ".join(map(str, seen)))
    if os.environ.get("DEAF"):
        time.sleep(60)
    raise Interrupted(seen[0])


def finish_the_step(rank: int) -> None:
    """Work until a signal comes, then as long as the rest of a step takes, save and leave."""
    with SignalStop() as stop:
        Path(f"{rank}.pid").write_text(str(os.getpid()))
        while not stop.requested:
            time.sleep(0.02)
        Path(f"{rank}.told").touch()
        time.sleep(1)
        Path(f"{rank}.saved").touch()
        stop.check()


if __name__ == "__main__":
    sys.exit(main())
