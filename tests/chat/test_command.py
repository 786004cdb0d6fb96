"""`rlhf chat` as people use it: on a run, in a pseudo-terminal, through a pipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests import preloaded
from tests.end_to_end.test_quickstart import SMALL
from tests.terminals import Terminal

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """The quickstart in small, up to PPO."""
    folder = tmp_path_factory.mktemp("chat") / "small"
    changes = [part for setting in SMALL for part in ("--set", setting)]
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    command = ["run", recipe, "--run-dir", str(folder), "--to", "ppo", *changes]
    preloaded.run(command, env=ENVIRONMENT | {"CI": "1"}).check_returncode()
    return folder


def chat(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return preloaded.run(["chat", *arguments], stdin=stdin or "", env=ENVIRONMENT)


@pytest.mark.slow
def test_one_prompt_as_json(run):
    outcome = chat(str(run), "--prompt", "Tell me about cats.", "--json", "--max-new-tokens", "6")
    assert outcome.returncode == 0, outcome.stderr
    turn = json.loads(outcome.stdout)
    assert turn["prompt"] == "Tell me about cats."
    sft, ppo = turn["replies"]
    assert (sft["model"], ppo["model"], ppo["kl_to"]) == ("sft", "ppo", "sft"), "a built base model is noise"
    assert isinstance(sft["reward"], float)
    assert isinstance(ppo["kl_nats"], float)
    assert not (run / "kept" / "chat").exists()


@pytest.mark.slow
def test_a_prompt_from_a_pipe_is_answered_in_text(run):
    outcome = chat(str(run), "--models", "ppo", stdin="Tell me about cats.\n")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith("ppo\n")
    assert "reward" in outcome.stdout
    assert "\x1b" not in outcome.stdout


@pytest.mark.slow
def test_what_cannot_be_answered_is_said(run, tmp_path):
    assert "the prompt is empty" in chat(str(run)).stderr
    assert "no model `dpo` to talk to" in chat(str(run), "--models", "dpo", "-p", "x").stderr
    assert "no such" in chat(str(tmp_path / "absent"), "-p", "x").stderr


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 120])
def test_a_chat_in_a_terminal(run, width, tmp_path):
    transcript = tmp_path / "turns.jsonl"
    terminal = Terminal(width, "chat", str(run), "--transcript", str(transcript), "--max-new-tokens", "8")
    assert "sft, ppo reply" in terminal.until(r"\n> ")
    terminal.type("Tell me about cats.\n")
    shown = terminal.until(r"log-ratio to[^>]*> ")
    assert "reward" in shown
    assert bool(re.search(r"sft {30,}ppo", shown)) is (width >= 100), "side by side where there is room"
    terminal.type("/best ppo\n")
    shown = "".join(terminal.until(r"once\s+it\s+holds\s+more").split())  # where it wraps depends on the folder's name
    rankings = run / "kept" / "chat" / "rankings.jsonl"
    assert str(rankings.name) in shown
    label = json.loads(rankings.read_text().splitlines()[-1])
    assert (label["ranking"], len(label["completions"])) == ([[0], [1]], 2)
    terminal.type("/rank nobody > ppo\n")
    terminal.until("`nobody` did not reply")
    terminal.type("/help\n")
    terminal.until("Ctrl-D")
    terminal.type("/quit\n")
    assert terminal.process.wait(timeout=60) == 0
    assert json.loads(transcript.read_text())["replies"][1]["model"] == "ppo"
