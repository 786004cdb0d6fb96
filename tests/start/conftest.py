"""Questions of a newcomer, and a model whose template can be told not to reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.start.draft import Draft
from rlhf_cli.start.questions import Given, Questions

QUESTIONS = [f"What is the capital of country {number}?" for number in range(30)]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.txt"
    path.write_text("".join(f"{question}\n" for question in QUESTIONS))
    return path


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    path = tmp_path / "preferences.jsonl"
    rows = [{"prompt": question, "chosen": "Paris.", "rejected": f"No {n}."} for n, question in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def scoring(tmp_path: Path) -> str:
    (tmp_path / "judge.py").write_text(
        "def score(prompts, completions):\n    return [len(c) / 10 for c in completions]\n"
    )
    return "judge.py:score"


@pytest.fixture
def draft(tmp_path, monkeypatch, tiny_llama, questions):
    """Makes what is to be written of the tiny chat model and the questions."""
    monkeypatch.chdir(tmp_path)

    def make(*settings: str, **given: object) -> Draft:
        own = {"model": str(tiny_llama), "prompts": str(questions), "steps": 10} | given
        return Questions(Given(**own, settings=settings), None).draft()

    return make


def said(capsys) -> str:
    """What was printed since the last call, in one line."""
    return " ".join(capsys.readouterr().err.split())
