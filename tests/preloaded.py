"""Runs the real command in a process of its own that need not import torch and transformers first.

On a slow machine the imports of a stage take ten seconds, and its work on a tiny model one. A server process per worker
of pytest imports the libraries and what every stage imports of `rlhf_cli`, and no stage; each command is a fork of it,
with arguments, folder, environment and streams of its own. A server is started when an environment comes up for the
second time, as far as it is read on import; until then, and where processes cannot be forked, commands are started as
usual. All forks of a server hash strings alike; tests that runs are equal to the byte start processes of their own, and
so do those of another copy of `rlhf_cli` in PYTHONPATH.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

RLHF = str(Path(sys.executable).with_name("rlhf"))
_READ_ON_IMPORT = (
    "HF_", "HUGGING", "TRANSFORMERS_", "TOKENIZERS_", "TORCH", "PYTORCH", "TRITON", "OMP_", "MKL_", "OPENBLAS_", "CUDA",
    "PYTHON", "LD_", "MALLOC_", "GLIBC_", "HOME", "XDG_", "ACCELERATE_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "TMPDIR",
    "COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "TTY_",
)  # fmt: skip
_servers: dict[str, subprocess.Popen[str] | None] = {}
"""What is read on import -> server; None after the first command."""


def run(
    arguments: Sequence[object],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run `rlhf` with arguments and wait for its end, as `subprocess.run` does with captured text.

    Args:
        arguments: of the command.
        cwd: its working directory; None is the present one.
        env: all its environment variables; None are those of this process.
        stdin: what it reads.
        timeout: seconds until it is killed.

    Raises:
        subprocess.TimeoutExpired: it did not end in time.
    """
    command, variables = [RLHF, *map(str, arguments)], dict(os.environ if env is None else env)
    folder = str(cwd or Path.cwd())
    server = _server(variables)
    if server is None:
        return subprocess.run(
            command,
            cwd=folder,
            env=variables,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    started = _fork(server, command, folder, variables, stdin)
    try:
        code = started.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        raise
    return subprocess.CompletedProcess(command, code, *started.communicate())


def start(
    arguments: Sequence[object], *, program: Path | str = RLHF, cwd: Path | None = None, env: Mapping[str, str]
) -> Started | subprocess.Popen[str]:
    """Start `rlhf` or another Python program, as `subprocess.Popen` does with captured text.

    Args:
        arguments: of the program.
        program: a script of Python, or the command.
        cwd: its working directory; None is the present one.
        env: all its environment variables.
    """
    command, folder = [str(program), *map(str, arguments)], str(cwd or Path.cwd())
    if (server := _server(env)) is not None:
        return _fork(server, command, folder, env)
    if program != RLHF:
        command.insert(0, sys.executable)
    return subprocess.Popen(
        command, cwd=folder, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


class Started:
    """A fork of a server: what the tests use of `subprocess.Popen`.

    Args:
        server: its parent.
        command: for messages.
        pid: of the fork.
        streams: folder of the files that are its standard streams.
    """

    def __init__(self, server: subprocess.Popen[str], command: list[str], pid: int, streams: Path) -> None:
        self._server, self._command, self._streams = server, command, streams
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self._wait(0)

    def wait(self, timeout: float = 300) -> int:
        """Wait for the end; returns the exit code.

        Raises:
            subprocess.TimeoutExpired: it did not end in time.
        """
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self._command, timeout, *self._texts())
        return code

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end; returns what it printed to stdout and stderr. Its files are removed."""
        self.wait(timeout)
        texts = self._texts()
        shutil.rmtree(self._streams)
        return texts

    def send_signal(self, signum: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def _wait(self, timeout: float) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(self._server, {"wait": self.pid, "timeout": timeout})
        return self.returncode

    def _texts(self) -> tuple[str, str]:
        out, err = (
            (self._streams / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")
        )
        return out, err


def _fork(
    server: subprocess.Popen[str], command: list[str], folder: str, variables: Mapping[str, str], stdin: str = ""
) -> Started:
    streams = Path(tempfile.mkdtemp())
    for name, text in {"stdin": stdin, "stdout": "", "stderr": ""}.items():
        (streams / name).write_text(text, encoding="utf-8")
    pid = _ask(server, {"argv": command, "cwd": folder, "env": dict(variables), "streams": str(streams)})
    assert pid is not None
    return Started(server, command, pid, streams)


def _hides_a_package(folders: str) -> bool:
    """Whether folders, which forks add to the path, hold a module with the name of one that is installed."""
    return any(
        importlib.util.find_spec(module.stem) is not None
        for folder in filter(None, folders.split(os.pathsep))
        if Path(folder).resolve() != Path(__file__).resolve().parents[1]
        for module in Path(folder).glob("*.py")
    )


def _server(variables: Mapping[str, str]) -> subprocess.Popen[str] | None:
    """Return the server that has imported with these variables; None if there is none yet."""
    read = {name: value for name, value in sorted(variables.items()) if name.startswith(_READ_ON_IMPORT)}
    if _hides_a_package(read.pop("PYTHONPATH", "")):  # of which the server has imported the real one
        return None
    key = json.dumps(read)
    is_first = key not in _servers
    if is_first or not hasattr(os, "fork") or variables.get("OMP_NUM_THREADS") != "1":
        _servers[key] = None
        return None
    server = _servers[key]
    if server is None or server.poll() is not None:
        # A pipe as stderr: what asks on import whether it writes to a terminal finds none, as in the commands.
        server = subprocess.Popen(
            [sys.executable, __file__], env=dict(variables), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        atexit.register(server.terminate)
        _servers[key] = server
    return server


def _ask(server: subprocess.Popen[str], question: Mapping[str, Any]) -> int | None:
    """Return a server's answer: the process of a new fork, or the exit code of an old one; None if it goes on."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(question) + "\n")
    server.stdin.flush()
    line = server.stdout.readline()
    assert line, f"the server ended: {server.stderr.read() if server.stderr else ''}"
    return json.loads(line)


def _serve(questions: IO[str], answers: IO[str]) -> None:
    """Fork, or wait for a fork, as each question says."""
    preload()
    tasks = Path("/proc/self/task")
    assert not tasks.is_dir() or len(list(tasks.iterdir())) == 1, "a fork of a process with threads may hang"
    for line in questions:
        question = json.loads(line)
        if "wait" in question:
            answer = _wait_for(question["wait"], question["timeout"])
        elif (answer := os.fork()) == 0:
            _become(question)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _wait_for(pid: int, seconds: float) -> int | None:
    """Return the exit code of a fork; None if it goes on after so many seconds."""
    signal.setitimer(signal.ITIMER_REAL, seconds)  # 0: none
    try:
        found, status = os.waitpid(pid, 0 if seconds else os.WNOHANG)
    except TimeoutError:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return os.waitstatus_to_exitcode(status) if found else None


def preload() -> None:
    """Import what the commands of all stages import, and nothing that one of them could have forgotten to import."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # as the command does, which is slow otherwise
    import matplotlib.backends.backend_agg  # noqa: F401

    # Names that transformers imports when they are first asked for, among them those that take longest.
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import rlhf_cli.cli.run_summary
    import rlhf_cli.cli.stage_command
    import rlhf_cli.models.preflight
    import rlhf_cli.pipeline.runner
    import rlhf_cli.recipe.loader  # noqa: F401

    get_checkpoint_conversion_mapping("llama")  # makes the table of all models, once per process
    # Stages collect garbage, which is slow with the objects of all libraries, and copies their pages in a fork.
    gc.collect()
    gc.freeze()


def _become(question: Mapping[str, Any]) -> None:
    """Turn this fork into the command or program; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.setpgid(0, 0)
        os.chdir(question["cwd"])
        os.environ.clear()
        os.environ.update(question["env"])
        random.seed()  # from the system, as a new process would
        for number, (name, flags) in enumerate(
            (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY | os.O_CREAT), ("stderr", os.O_WRONLY | os.O_CREAT))
        ):
            os.dup2(os.open(Path(question["streams"], name), flags), number)
        sys.argv = question["argv"]
        folders = filter(None, question["env"].get("PYTHONPATH", "").split(os.pathsep))
        sys.path[:1] = [str(Path(sys.argv[0]).parent), *folders]
        if sys.argv[0] != RLHF:
            runpy.run_path(sys.argv[0], run_name="__main__")
        from rlhf_cli.cli import main

        code = main() if sys.argv[0] == RLHF else 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()
        os._exit(code)


def _timed_out(signum: int, frame: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _timed_out)
    # What libraries print while they are imported is no answer.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(sys.stdin, channel)
