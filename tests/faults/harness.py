"""A small PPO run with the real command: killed in any phase, resumed, and compared byte by byte.

Nothing in the product helps it. What the run is doing is seen from outside: the reward, which is the user's code,
writes down when it begins and ends to score, and the folders of the checkpoints come and go.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
_TEXTS = [
    "What is bread made of?",
    "Why is the sky blue?",
    "The cat sat on the warm stone and watched the river.",
    "First heat the oven, second knead the dough",
    "A short answer is often the best answer.",
    "Please tell me how bread is baked.",
    "Air scatters blue light more than red light.",
]
_REWARD = '''"""Scores by letters and a little chance, slowly enough to be killed meanwhile.

FAULT: misbehaves; SLOW_DISK: seconds of a sync of a checkpoint in the background.
"""

import os
import random
import signal
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
SYNC = os.fsync


def slow_sync(descriptor):
    """Take longer in the thread that writes a checkpoint while training goes on."""
    if threading.current_thread().name == "checkpoint":
        time.sleep(float(os.environ["SLOW_DISK"]))
    SYNC(descriptor)


if "SLOW_DISK" in os.environ:
    os.fsync = slow_sync


def say(word):
    done = max((int(path.name[5:]) for path in HERE.glob("run/.ppo.work/step-0*")), default=-1)
    with (HERE / "events").open("a") as file:
        file.write(f"{word} {done + 1}\\n")
    return done + 1


def score(prompts, completions):
    step = say("scoring")
    fault, _, place = os.environ.get("FAULT", "").partition(":")
    if fault == "signal" and step == int(place):
        os.kill(os.getpid(), signal.SIGTERM)
    if fault == "hang" and step == int(place):
        time.sleep(600)
    time.sleep(0.05)
    say("scored")
    return [sum(c in "aeiou" for c in text) - 0.1 * len(text) + random.gauss(0, 0.1) for text in completions]
'''
SETTINGS: dict[str, object] = {
    "model.precision": "float32",
    "model.device": "cpu",
    "data.holdout": 0,
    "ppo.steps": STEPS,
    "ppo.prompts_per_step": 4,
    "ppo.max_new_tokens": 16,
    "ppo.epochs": 2,
    "ppo.minibatches": 2,
    "ppo.micro_batch_size": 2,
    "ppo.learning_rate": 1e-3,
    "ppo.kl_target": 1.0,
    "ppo.lora.rank": 4,
    "ppo.lora.alpha": 8.0,
    "ppo.checkpoint_steps": 1,
}
PHASES = ("rollout", "scoring", "update", "saving")


@dataclass(frozen=True)
class End:
    """How a process ended."""

    code: int
    stderr: str


class Process(Protocol):
    """What is needed of a process that was started or forked."""

    @property
    def returncode(self) -> int | None:
        """The exit code, once it is known."""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""

    def wait(self) -> int:
        """Wait for the end; returns the exit code."""

    def send_signal(self, signum: int) -> None:
        """Send it a signal."""


class Forked:
    """A `Process` that was forked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """See `Process`."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """See `Process`."""
        code = self._wait(0)
        assert code is not None
        return code

    def send_signal(self, signum: int) -> None:
        """See `Process`."""
        os.kill(self.pid, signum)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


@dataclass(frozen=True)
class SmallRun:
    """A run and what it needs.

    Attributes:
        folder: of the run directory `run`, and of the reward, which writes beside itself what it does.
        parts: folder of model and prompts. Runs to be compared share it: artifacts say where their base model is.
        settings: recipe settings beside `SETTINGS`.
        arguments: of the command beside them.
    """

    folder: Path
    parts: Path
    settings: Mapping[str, object] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.folder / "run"

    @property
    def work(self) -> Path:
        """Where the unfinished stage keeps its checkpoints."""
        return self.run_dir / ".ppo.work"

    @property
    def caught(self) -> Path:
        """The checkpoint of the last step, which the stage removes when it is done."""
        return self.folder / "caught"

    @property
    def command(self) -> list[str]:
        """The real command."""
        given = SETTINGS | dict(self.settings)
        model, prompts = str(self.parts / "model"), str(self.parts / "prompts.jsonl")
        files = ["--model", model, "--prompts", prompts, "--function", "reward.py:score", "--run-dir", "run"]
        named = [part for name, value in given.items() for part in ("--set", f"{name}={json.dumps(value)}")]
        return [sys.executable, "-m", "rlhf_cli", "ppo", *files, *named, *self.arguments]

    @classmethod
    def new(cls, folder: Path, parts: Path, settings: Mapping[str, object] | None = None, *arguments: str) -> SmallRun:
        """One that has not begun; model and prompts are made unless they are there."""
        if not parts.exists():
            _make_parts(parts)
        folder.mkdir()
        (folder / "reward.py").write_text(_REWARD)
        return cls(folder, parts, settings or {}, arguments)

    def copy(self, folder: Path) -> SmallRun:
        """The same in another folder, with whatever the run has come to."""
        shutil.copytree(self.folder, folder)
        return SmallRun(folder, self.parts, self.settings, self.arguments)

    def start(self, *, before: str | None = None, **variables: str) -> subprocess.Popen[bytes]:
        """Start the command, whose stderr goes to a file; `before` is Python that its process runs first."""
        (self.folder / "events").write_text("")
        command = self.command
        if before is not None:
            script = f"import sys\n{before}\nfrom rlhf_cli.cli import main\nsys.exit(main())"
            command = [sys.executable, "-c", script, *command[3:]]
        environment = os.environ | {"CI": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
        path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        with (self.folder / "stderr").open("wb") as stderr, (self.folder / "stdout").open("wb") as stdout:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=stdout, stderr=stderr)

    def fork(self) -> Forked:
        """The command in a fork of this process, which may have imported what is slow to import."""
        (self.folder / "events").write_text("")
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return Forked(pid)
        os.chdir(self.folder)
        os.environ.update({"CI": "1", "HF_HUB_OFFLINE": "1"})
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["rlhf", *self.command[3:]]
        code = 1
        try:
            from rlhf_cli.cli import main

            code = main()
        finally:  # never back into the caller's code
            os._exit(code)

    def finish(self, process: Process, timeout: float = 300) -> End:
        """Wait for the end, and catch the last checkpoint in the moment that it is there."""
        deadline = time.monotonic() + timeout
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.send_signal(signal.SIGKILL)
                raise TimeoutError(f"no end within {timeout:g} s\n{self.stderr}")
            self.catch()
            time.sleep(0.002)
        return End(process.wait(), self.stderr)

    def run(self, *, before: str | None = None, **variables: str) -> End:
        """Start the command and wait for its end."""
        return self.finish(self.start(before=before, **variables))

    def run_here(self, **variables: str) -> End:
        """The same in this process, without the seconds that a start takes; for what kills nobody."""
        from rlhf_cli.cli import main

        (self.folder / "events").write_text("")
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.002):
                self.catch()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with (
                (self.folder / "stderr").open("w") as stderr,
                (self.folder / "stdout").open("w") as stdout,
                mock.patch.dict(os.environ, {"CI": "1"} | variables),
                mock.patch.object(sys, "argv", ["rlhf", *self.command[3:]]),
                contextlib.chdir(self.folder),
                contextlib.redirect_stdout(stdout),
                contextlib.redirect_stderr(stderr),
                warnings.catch_warnings(),
            ):
                code = main()
        finally:
            over.set()
            watcher.join()
        return End(code, self.stderr)

    @property
    def stderr(self) -> str:
        """What the command said so far, on one line: it is folded at some width."""
        return " ".join((self.folder / "stderr").read_text(errors="replace").split())

    def catch(self) -> None:
        """Link the files of the last step's checkpoint to where nobody removes them."""
        last = self.work / f"step-{SETTINGS['ppo.steps']:08d}"
        if not self.caught.exists() and last.is_dir():
            temporary = self.folder / "caught.partial"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            # The folder has its name once it is whole; it goes away when the stage is done.
            with contextlib.suppress(FileNotFoundError):
                for path in sorted(last.iterdir()):
                    os.link(path, temporary / path.name)
                temporary.rename(self.caught)

    def kill(self, process: Process) -> str:
        """SIGKILL; returns the phase that the run was in."""
        process.send_signal(signal.SIGKILL)
        process.wait()
        return self.phase()

    def phase(self) -> str:
        """What a killed run was doing."""
        if (self.run_dir / "ppo").is_dir():
            return "the end"
        newest = self.newest()
        if any(self.work.glob(".step-*.partial")):
            return "saving"
        if newest is None:
            return "loading"
        word, _, step = self.events()[-1].partition(" ") if self.events() else ("", "", "")
        if step == str(newest + 1):
            return "scoring" if word == "scoring" else "update"
        return "publishing" if newest == SETTINGS["ppo.steps"] else "rollout"

    def events(self) -> list[str]:
        """What the reward wrote down in this attempt, one `word step` a line."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "events").read_text().splitlines()
        return []

    def newest(self) -> int | None:
        """Step of the newest checkpoint."""
        found = [int(path.name[5:]) for path in self.work.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name)]
        return max(found, default=None)

    def wait_for(self, process: Process, phase: str, step: int, timeout: float = 120) -> None:
        """Return once the run is in a phase of a step (1-based), or has ended."""
        reached: dict[str, Callable[[], bool]] = {
            "rollout": lambda: (self.work / f"step-{step - 1:08d}").exists(),
            "scoring": lambda: f"scoring {step}" in self.events(),
            "update": lambda: f"scored {step}" in self.events(),
            "saving": lambda: (self.work / f".step-{step:08d}.partial").exists(),
        }
        deadline = time.monotonic() + timeout
        while not reached[phase]() and process.poll() is None:
            if time.monotonic() > deadline:
                process.send_signal(signal.SIGKILL)
                raise TimeoutError(f"no {phase} of step {step} within {timeout:g} s\n{self.stderr}")
            self.catch()
            time.sleep(0.0005)

    def stopped(self) -> dict[str, str]:
        """SHA-256 of what a run that was asked to stop has come to: its newest checkpoint and its metrics."""
        files = dict(_files(self.work / f"step-{self.newest():08d}", "checkpoint"))
        files["metrics.jsonl"] = (self.work / "metrics.jsonl").read_bytes()
        return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}

    def digests(self) -> dict[str, str]:
        """SHA-256 of all that training came to: the finished stage's files, and the last checkpoint's.

        Manifest and `timing.jsonl` are skipped: they hold times, which are not a function of seed and step. The
        checkpoint holds weights, critic, optimizer and the rest.
        """
        files = dict(_files(self.run_dir / "ppo", "ppo")) | dict(_files(self.caught, "last checkpoint"))
        return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def _make_parts(parts: Path) -> None:
    from rlhf_cli.models.build import build_model
    from rlhf_cli.settings.shared import BuildSettings

    sizes = {"hidden_size": 32, "layers": 2, "heads": 4, "feed_forward_size": 64}
    build_model(parts / "model", _TEXTS, BuildSettings(**sizes, vocab_size=320, context_length=128), seed=0)
    (parts / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in _TEXTS))


def _files(folder: Path, name: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("manifest.json", "timing.jsonl"):
            yield f"{name}/{path.relative_to(folder)}", path.read_bytes()
