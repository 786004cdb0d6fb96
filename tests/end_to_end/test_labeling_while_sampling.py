"""`rlhf label` in a pseudo-terminal while completions are sampled, with a generator that waits for the test."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest

from rlhf_cli.labeling.label_sources import STORE
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Growth
from rlhf_cli.pipeline.run_directory import RunDirectory
from tests.labeling.terminal.terminal_support import Terminal

CHILD = """
import os, signal, time
from pathlib import Path
import rlhf_cli.stages.label.sampling as sampling
from rlhf_cli.cli import entry
from rlhf_cli.errors import DiskError
from rlhf_cli.generation.generator import Completion

class Gated:
    def generate(self, policy, requests, *, progress=None, stop=lambda: None):
        with Path("calls").open("a") as file:
            print(os.getpid(), len(requests), file=file)
        gate = Path(f"gate-{len(requests)}")
        while not gate.exists():
            stop()
            time.sleep(0.01)
        if gate.read_text() == "fail":
            raise DiskError("the disk is full", hint="free some space")
        if gate.read_text() == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return [Completion([n % 50 + 5], f"text {r.seed % 1000} {n}", True) for n, r in enumerate(requests)]

sampling.choose_generator = lambda *_: Gated()
entry()
"""
PROGRAM = f"""
import os, sys
folder = sys.argv[1]
os.chdir(folder)
os.environ.pop("CI", None)
from rlhf_cli.distributed import launcher
from rlhf_cli.cli import entry
launcher.ENTRY = ("-c", {CHILD!r})
sys.argv = ["rlhf", *open("arguments").read().split()]
entry()
"""
COUNT, FIRST, SECOND, THIRD = 6, 2, 6, 4
"""Prompts, and completions of the chunks: 1, 3 and 2 prompts with 2 completions each."""
SAMPLING = 120.0
"""Seconds until the first completions are there: torch is imported and a model loaded, on a busy machine."""


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> Path:
    lines = (json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(COUNT))
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: {tiny_llama}, precision: float32}}\ndata: {{prompts: prompts.jsonl}}\n"
        f"label: {{by: human, model: {tiny_llama}, completions_per_prompt: 2, human: {{repeat_share: 0.0}},\n"
        "  sampling: {max_new_tokens: 4, batch_size: 6}}\n"
    )
    (tmp_path / "arguments").write_text("label r.yaml --run-dir runs/mine")
    return tmp_path


@pytest.fixture
def started(folder: Path):
    terminals = []

    def start(**options) -> Terminal:
        terminals.append(Terminal(folder, program=PROGRAM, **options))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def open_gate(folder: Path, completions: int, what: str = "") -> None:
    temporary = folder / "gate"
    temporary.write_text(what)
    temporary.rename(folder / f"gate-{completions}")


def calls(folder: Path) -> list[int]:
    return [int(line.split()[1]) for line in (folder / "calls").read_text().splitlines()]


def sampler(folder: Path) -> int:
    """Process id of what samples."""
    return int((folder / "calls").read_text().splitlines()[-1].split()[0])


def progress(folder: Path):
    with closing(LabelSession(folder / "runs/mine" / STORE, read_only=True)) as session:
        return session.progress()


def rankings(folder: Path) -> list[str]:
    lines = (folder / "runs/mine/label/rankings.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def rank(terminal: Terminal, then: str, *, question: int | None = None) -> None:
    if question is not None:
        terminal.wait_for(f"Question {question}?", SAMPLING)
    terminal.type("ab", then="Enter submits")
    terminal.type("\r")
    terminal.wait_for(then, SAMPLING)


def test_the_first_answers_are_ranked_while_the_others_are_sampled(folder, started):
    terminal = started()
    open_gate(folder, FIRST)
    terminal.wait_for("Question 0?", SAMPLING)
    assert "1 of 6 prompts sampled" in str(terminal.screen)
    assert "sampling the first completions" not in str(terminal.screen)
    rank(terminal, "All that is ready is labeled")
    terminal.type("\r", then="the next task appears by itself; q quits")
    open_gate(folder, SECOND)
    terminal.wait_for("4 of 6 prompts sampled")
    for question in (1, 2):
        rank(terminal, f"Question {question + 1}?", question=question)
    open_gate(folder, THIRD)
    rank(terminal, "Question 4?", question=3)
    rank(terminal, "Question 5?", question=4)
    terminal.wait_for(" 6 of 6 ")
    deadline = time.monotonic() + 60
    while "prompts sampled" in str(terminal.screen):  # the last look finds everything there
        assert time.monotonic() < deadline
        terminal.read()
    rank(terminal, "Labeling is complete", question=5)
    terminal.type("\r")
    terminal.wait_for("labeling is complete: the pipeline can continue")
    out = finished(terminal, 0)
    assert out == "runs/mine/label\n"
    assert rankings(folder) == [f"Question {n}?" for n in range(COUNT)]
    assert calls(folder) == [FIRST, SECOND, THIRD]


def finished(terminal: Terminal, code: int) -> str:
    """Wait for the end of the command; returns stdout."""
    deadline = time.monotonic() + SAMPLING
    while terminal.process.poll() is None:
        assert time.monotonic() < deadline, str(terminal.screen)
        terminal.read()
    out = terminal.ended()
    assert terminal.process.returncode == code, str(terminal.screen)
    return out


def test_who_leaves_early_pauses_the_stage_and_the_next_command_goes_on(folder, started):
    terminal = started(columns=120)
    open_gate(folder, FIRST)
    terminal.wait_for("Question 0?", SAMPLING)
    rank(terminal, "All that is ready is labeled")
    terminal.type("q")
    assert finished(terminal, 76) == ""
    said = " ".join(str(terminal.screen).split())
    assert "waiting: the pipeline waits for labels: 1 of 6 prompts are labeled, 1 of 6 prompts sampled" in said
    assert "repeat the command that started this run" in said
    assert not RunDirectory(folder / "runs/mine").is_in_use
    assert calls(folder) == [FIRST, SECOND]

    open_gate(folder, SECOND)
    open_gate(folder, THIRD)
    terminal = started()
    terminal.wait_for("Question 1?", SAMPLING)
    assert calls(folder) == [FIRST, SECOND, SECOND, THIRD][: len(calls(folder))], "the first one is not sampled again"
    for question in range(1, COUNT):
        rank(terminal, f"Question {question + 1}?" if question + 1 < COUNT else "is complete", question=question)
    terminal.type("\r")
    finished(terminal, 0)
    assert rankings(folder) == [f"Question {n}?" for n in range(COUNT)]


@pytest.mark.parametrize(("what", "code", "says"), [("fail", 74, "error: the disk is full"), ("die", 137, "SIGKILL")])
def test_an_error_of_sampling_ends_the_session_and_keeps_what_was_entered(folder, started, what, code, says):
    terminal = started()
    open_gate(folder, FIRST)
    terminal.wait_for("Question 0?", SAMPLING)
    terminal.type("b", then="ranking  b")
    open_gate(folder, SECOND, what)
    finished(terminal, code)
    assert says in str(terminal.screen)
    assert "the open task is saved as a draft" in str(terminal.screen)
    assert progress(folder).growth == Growth(1, COUNT)

    open_gate(folder, SECOND)
    terminal = started()
    terminal.wait_for("resumed your draft", SAMPLING)
    rank(terminal, "Question 1?")
    terminal.type("q")
    finished(terminal, 76)
    assert progress(folder).labels == 1


def test_a_killed_command_leaves_no_sampler_and_loses_no_label(folder, started):
    terminal = started()
    open_gate(folder, FIRST)
    terminal.wait_for("Question 0?", SAMPLING)
    rank(terminal, "All that is ready is labeled")
    while len(calls(folder)) < 2:
        terminal.read()
    terminal.process.send_signal(signal.SIGKILL)
    terminal.process.wait()
    deadline = time.monotonic() + 30
    while RunDirectory(folder / "runs/mine").is_in_use:
        assert time.monotonic() < deadline, "the sampler outlives the command"
        time.sleep(0.05)
    open_gate(folder, SECOND)
    terminal = started()
    terminal.wait_for("Question 1?", SAMPLING)
    assert progress(folder).labels == 1
    os.kill(sampler(folder), signal.SIGKILL)  # and the other way round
    finished(terminal, 137)
    assert progress(folder).labels == 1


def test_ctrl_c_before_the_first_answers_stops_as_it_always_did(folder, started):
    terminal = started()
    while not (folder / "calls").exists():
        terminal.read()
    terminal.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + SAMPLING
    while terminal.process.poll() is None:
        assert time.monotonic() < deadline
        terminal.read()
    terminal.read()
    assert terminal.process.returncode == 130
    assert "stopped by SIGINT" in str(terminal.screen)
