"""Labeling that ends before all prompts are labeled: the command that waits says how to go on, and that works."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest

from rlhf_cli.labeling.label_sources import STORE
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Entry


def label_one(run_dir: Path) -> None:
    with contextlib.closing(LabelSession(run_dir / STORE, create=False)) as session:
        who = session.annotator("Ann").id
        task = session.next(who)
        assert task is not None
        session.submit(who, task.id, Entry(((0,), (1,))), key="first", active_seconds=0)


@pytest.mark.parametrize("by", ["label", "run"])
def test_a_run_that_waits_goes_on_with_the_labels_there_are(by, rlhf_here, tiny_llama, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(4)))
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: {tiny_llama}, precision: float32}}\ndata: {{prompts: prompts.jsonl}}\n"
        "label: {by: human, completions_per_prompt: 2, sampling: {max_new_tokens: 4}}\n"
    )
    command = (by, "r.yaml", "--run-dir", "runs/mine", "--set", f"label.model={tiny_llama}")
    code, said = rlhf_here(*command)
    assert code == 76
    assert "label.human.enough" not in said, "no label yet"
    label_one(tmp_path / "runs/mine")
    code, said = rlhf_here(*command)
    assert code == 76
    (setting,) = re.findall(r"`--set (label\.human\.enough=0\.\d+)`", said)
    code, said = rlhf_here(*command, "--set", setting)
    assert code == 0, said
    assert "completions were sampled before" in said or "reusing" in said or "resuming" in said
    assert len((tmp_path / "runs/mine/label/rankings.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(("by", "form"), [("label", "--force"), ("run", "--force label")])
def test_the_way_to_discard_is_the_one_of_the_command(by, form, rlhf_here, tiny_llama, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(4)))
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: {tiny_llama}, precision: float32}}\ndata: {{prompts: prompts.jsonl}}\n"
        "label: {by: human, completions_per_prompt: 2, sampling: {max_new_tokens: 4}}\n"
    )
    command = (by, "r.yaml", "--run-dir", "runs/mine", "--set", f"label.model={tiny_llama}")
    assert rlhf_here(*command)[0] == 76
    changed = (*command, "--set", "label.human.overlap=2")
    code, said = rlhf_here(*changed)
    assert code == 2
    assert "`label.human.overlap` was 1, now 2" in said
    assert f"discard the unfinished work with `{form}`" in said
    assert rlhf_here(*changed, *form.split())[0] == 76
