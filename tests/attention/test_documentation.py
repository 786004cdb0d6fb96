"""docs/attention.md: its example is a working backend, and `verify` reports the features it lacks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "attention.md"


def test_the_example_of_ten_lines_is_a_backend(rlhf, tmp_path):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line]) <= 10
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    arguments = ("attention", "verify", "--attention", "mine:attend")
    found = rlhf(*arguments, code=1, env={"PYTHONPATH": str(tmp_path)}).stdout
    verdicts = {line.split()[0]: line.split()[-1] for line in found.splitlines() if " mine:attend " in line}
    failing = {family for family, verdict in verdicts.items() if verdict == "FAILED"}
    assert failing == {"gemma2", "gpt_oss", "t5"}
    assert {"llama", "gpt2", "bert", "bart", "mistral"} <= {name for name in verdicts if verdicts[name] == "ok"}


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("return query * 0", 65, "computes different values under our attention"),
        ("return query[:, :1]", 2, "attention backend `mine:attend` must return a tensor of shape (1, 4, "),
        ("return None", 2, "attention backend `mine:attend` must return a tensor, got NoneType"),
        ("return query @ value", 2, "attention backend `mine:attend` raised RuntimeError: "),
    ],
)
def test_a_run_refuses_a_wrong_one_before_training(body, code, message, rlhf, tmp_path, tiny_llama):
    (tmp_path / "mine.py").write_text(f"def attend(query, key, value, layout, **rules):\n    {body}\n")
    (tmp_path / "text.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    arguments = ("sft", "--model", tiny_llama, "--data", "text.jsonl", "--run-dir", "run")
    failed = rlhf(*arguments, "--attention", "mine:attend", code=code, env={"PYTHONPATH": str(tmp_path)})
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("name", ["triton", "nowhere:attend"])
def test_a_backend_that_is_not_there_leaves_nothing_begun(name, rlhf, tmp_path, tiny_llama):
    (tmp_path / "text.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    arguments = ("sft", "--model", tiny_llama, "--data", "text.jsonl", "--run-dir", "run")
    hidden = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    failed = rlhf(*arguments, "--attention", name, code=2, env=hidden)
    assert name.partition(":")[0] in failed.stderr
    assert not list((tmp_path / "run").glob("*sft*"))
