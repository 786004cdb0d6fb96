"""What functions are told besides prompts and completions, as their signatures ask, by every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlhf_cli.errors import DataError
from rlhf_cli.rewards.python_function import load_scoring_function

COLUMNS = {"references": ["x", None], "completion_ids": [[1, 2], [3]], "raw_completions": ["a</s>", "b"]}


def function(tmp_path: Path, source: str):
    (tmp_path / "f.py").write_text(source)
    return load_scoring_function(f"{tmp_path / 'f.py'}:score")


@pytest.mark.parametrize(
    ("signature", "seen"),
    [
        ("p, c", {}),
        ("p, c, references", {"references"}),
        ("p, c, references=None, *, completion_ids=()", {"references", "completion_ids"}),
        ("p, c, raw_completions, weight=1", {"raw_completions"}),
        ("p, c, **kwargs", set(COLUMNS)),
    ],
)
def test_a_function_gets_what_its_signature_names(signature, seen, tmp_path):
    names = [name for name in COLUMNS if name in signature]
    given = "kwargs" if "**" in signature else "dict(" + ", ".join(f"{name}={name}" for name in names) + ")"
    body = f"seen = []\ndef score({signature}):\n    seen.append({given})\n    return [0.0] * len(c)\n"
    scorer = function(tmp_path, body)
    scorer.score(["p", "q"], ["a", "b"], COLUMNS)
    assert scorer.function.__globals__["seen"] == [{name: COLUMNS[name] for name in seen}]


def test_what_is_not_known_needs_a_default(tmp_path):
    assert function(tmp_path, "def score(p, c, references=7):\n    return [references] * len(c)\n").score(
        ["p"], ["a"]
    ) == [7.0]
    asks = function(tmp_path, "def score(p, c, references):\n    return [0.0] * len(c)\n")
    with pytest.raises(DataError, match="asks for `references`, but no prompt has a `reference`") as error:
        asks.score(["p"], ["a"])
    assert "data.columns={reference: solution}" in str(error.value.hint)
    asks = function(tmp_path, "def score(p, c, completion_ids):\n    return [0.0] * len(c)\n")
    with pytest.raises(DataError, match="these completions were not sampled, so they have no token ids"):
        asks.score(["p"], ["a"])


def test_the_sample_at_fault_is_found_with_its_columns(tmp_path):
    body = "def score(p, c, references):\n    return [float(one) for one in references]\n"
    with pytest.raises(DataError, match="the prompt 'q' and the completion 'b'"):
        function(tmp_path, body).score(["p", "q"], ["a", "b"], {"references": ["1", "x"]})


RECORDER = """
import json, pathlib
SEEN = pathlib.Path(__file__).with_name("seen.jsonl")
def score(prompts, completions, references=None, completion_ids=None, raw_completions=None):
    with SEEN.open("a") as file:
        for row in zip(prompts, completions, references, completion_ids, raw_completions, strict=True):
            file.write(json.dumps(row) + "\\n")
    return [float(len(ids)) for ids in completion_ids]
"""


@pytest.mark.parametrize("command", ["label", "ppo", "evaluate"])
def test_references_and_token_ids_reach_functions_of_every_command(command, rlhf_here, tiny_llama, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Question {n}?", "solution": f"fact {n}"}) + "\n" for n in range(6))
    )
    (tmp_path / "rate.py").write_text(RECORDER)
    shared = ["--set", "data.columns={reference: solution}", "--set", "model.precision=float32"]
    shared += ["--set", "data.holdout=0", "--function", "rate.py:score", "--prompts", "prompts.jsonl"]
    models = ["--policy", tiny_llama, "--baseline", tiny_llama] if command == "evaluate" else ["--model", tiny_llama]
    own = {"ppo": ["ppo.steps=1", "ppo.prompts_per_step=6", "ppo.max_new_tokens=5"]}
    settings = own.get(command, [f"{command}.sampling.max_new_tokens=5"])
    code, said = rlhf_here(command, *models, *shared, *(part for one in settings for part in ("--set", one)))
    assert code == 0, said
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert {prompt for prompt, *_ in seen} == {f"Question {n}?" for n in range(6)}
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for prompt, completion, reference, ids, raw in seen:
        assert reference == prompt.replace("Question", "fact").rstrip("?")
        assert raw == tokenizer.decode(ids)
        assert raw.startswith(completion)
