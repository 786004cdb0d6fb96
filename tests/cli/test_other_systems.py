"""What Windows and macOS lack is not needed to import the package and to use the commands that run no stage.

No such machine is at hand: names that only POSIX has are removed, and modules made impossible to import.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, os, signal, types, importlib, pkgutil
import torch, transformers, peft, accelerate, typer, rich.console, rich.progress, pydantic, psutil, asyncio  # not ours
import concurrent.futures, http.server, multiprocessing, pathlib, platform, selectors
import shutil, socket, subprocess, tempfile
for name in ("datasets", "starlette", "uvicorn", "matplotlib.pyplot", "aiohttp", "prompt_toolkit", "pyarrow.parquet"):
    try:
        importlib.import_module(name)
    except ImportError:
        pass

platform.platform()  # asks the system once
windows = sys.argv.pop(1) == "windows"
for name in ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline", "syslog"):
    if windows:
        sys.modules[name] = None
MAC = "sched_getaffinity sched_setaffinity posix_fadvise fdatasync O_TMPFILE memfd_create".split()
WINDOWS = MAC + (
    "fork forkpty getuid geteuid getgid getegid getpgrp getpgid setpgid setsid killpg fchmod fchown chown mkfifo "
    "uname sysconf nice getloadavg openpty ttyname posix_spawn WNOHANG O_NOCTTY O_NONBLOCK "
    "O_DIRECTORY O_CLOEXEC wait3 wait4 sync getpriority"
).split()
for name in WINDOWS if windows else MAC:
    if hasattr(os, name):
        delattr(os, name)
if windows:
    missing = "SIGHUP SIGKILL SIGUSR1 SIGUSR2 SIGTSTP SIGCONT SIGSTOP SIGWINCH SIGALRM SIGPIPE SIGCHLD SIGQUIT"
    for name in missing.split():
        delattr(signal, name)
    for name in ("pthread_sigmask", "setitimer", "alarm", "sigwait", "pause", "siginterrupt"):
        delattr(signal, name)
    held = set()

    def locking(descriptor, mode, count):
        key = os.fstat(descriptor).st_ino
        if key in held:
            raise PermissionError(13, "Permission denied")
        held.add(key)

    sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
    opened = os.open

    def open_no_folder(path, flags, *more, **named):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, flags, *more, **named)

    os.open = open_no_folder
    sys.platform = "win32"  # os.name stays: pathlib makes no path of Windows here
else:
    sys.platform = "darwin"

import rlhf_cli
for module in pkgutil.walk_packages(rlhf_cli.__path__, "rlhf_cli."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:  # triton, and what is not installed
        missing = (error.name or "").split(".")[0]
        assert missing not in ("rlhf_cli", "fcntl", "resource", "termios"), (module.name, error)
        print("skipped", module.name, error.name, file=sys.stderr)

from rlhf_cli.cli import main
for line in sys.argv[1:]:
    sys.argv = ["rlhf", *line.split()]
    code = main()
    print("exit", code, line)
"""


SMALL = ["--help", "ppo --help", "init start", "recipe validate start/recipes/quickstart.yaml", "doctor"]
PROCESSES = "run r.yaml --processes 2"
RUNS = ["run r.yaml", "run r.yaml --run-dir other"]


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder, and how the commands ended there: all in one process, whose imports take longest."""
    folder = tmp_path_factory.mktemp("windows")
    (folder / "r.yaml").write_text("name: r\nmodel: {path: m}\nsft: {data: d.jsonl}\n")
    (folder / "d.jsonl").write_text("{}\n")
    return folder, run("windows", folder, *SMALL, PROCESSES, *RUNS)


def check_small_commands(ended: subprocess.CompletedProcess[str]) -> None:
    assert ended.returncode == 0, ended.stderr
    exits = [line for line in ended.stdout.splitlines() if line.startswith("exit")]
    assert exits[: len(SMALL)] == [f"exit 0 {one}" for one in SMALL]
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_on_macos_every_module_is_imported_and_the_small_commands_work(tmp_path):
    check_small_commands(run("macos", tmp_path, *SMALL))


@pytest.mark.slow
def test_on_windows_every_module_is_imported_and_the_small_commands_work(windows):
    check_small_commands(windows[1])


@pytest.mark.slow
def test_what_windows_cannot_do_is_refused_by_name(windows):
    _, ended = windows
    assert f"exit 2 {PROCESSES}" in ended.stdout, ended.stderr
    assert "error: `--processes` does not work on " in ended.stderr


@pytest.mark.slow
def test_a_run_directory_is_locked_and_unlocked_without_flock(windows):
    folder, ended = windows
    for path in ("runs/r", "other"):
        assert re.fullmatch(r"\d+ on \S+\n", (folder / path / ".lock").read_text()), ended.stderr


def run(system: str, folder: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, system, *lines],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_a_lock_of_windows_is_refused_as_a_lock_of_posix_is(tmp_path, monkeypatch):
    from rlhf_cli import files

    held: set[int] = set()

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert os.lseek(descriptor, 0, os.SEEK_CUR) > 1 << 20, "the number of the process stays readable"
        if held:
            raise PermissionError(13, "Permission denied")
        held.add(descriptor)

    monkeypatch.setattr(files, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking), raising=False)
    monkeypatch.setattr(files.sys, "platform", "win32")
    with (tmp_path / "a").open("a+") as first, (tmp_path / "a").open("a+") as second:
        files.lock(first)
        with pytest.raises(BlockingIOError):
            files.lock(second)
