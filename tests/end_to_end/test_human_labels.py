"""`recipes/human-labels.yaml`: the pipeline waits for people with an exit code of its own, and goes on with labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.errors import EXIT_WAITING
from rlhf_cli.labeling.label_sources import STORE
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Entry

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "human-labels.yaml"
SMALL = {
    "sft.epochs": 0.05,
    "model.build.layers": 1,
    "model.build.hidden_size": 32,
    "model.build.feed_forward_size": 64,
    "label.active_learning.prompts": 12,
    "label.sampling.max_new_tokens": 12,
    "train_rm.epochs": 1,
    "ppo.steps": 1,
    "ppo.prompts_per_step": 8,
    "ppo.max_new_tokens": 12,
    "ppo.micro_batch_size": 8,
    "ppo.rollout_batch_size": 8,
    "evaluate.max_prompts": 4,
    "evaluate.samples_per_prompt": 1,
    "evaluate.sampling.max_new_tokens": 12,
}


def label(run_dir: Path, *, most: int, name: str = "Ann") -> int:
    """Rank by length, the shorter the better, as a person at an interface would; returns how many are ranked."""
    session = LabelSession(run_dir / STORE, create=False)
    annotator, count = session.annotator(name).id, 0
    while count < most and (task := session.next(annotator)) is not None:
        order = sorted(range(len(task.completions)), key=lambda position: (len(task.completions[position]), position))
        entry = Entry(tuple((position,) for position in order))
        session.submit(annotator, task.id, entry, key=f"key {task.id}", active_seconds=0)
        count += 1
    session.close()
    return count


@pytest.fixture
def command(rlhf, tmp_path):
    prompts = (ROOT / "data_samples" / "prompts.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(prompts[::8]) + "\n")
    settings = ["--prompts", tmp_path / "few.jsonl"]
    settings += [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]

    def run(*arguments, **options):
        return rlhf("run", RECIPE, "--run-dir", tmp_path / "run", *settings, *arguments, **options)

    return run


def test_the_pipeline_waits_for_people_and_the_same_command_goes_on(command, rlhf, tmp_path):
    run_dir = tmp_path / "run"
    first = command(code=EXIT_WAITING)
    assert EXIT_WAITING == 76
    assert first.stdout == ""
    assert "waiting: the pipeline waits for labels: 0 of 12 prompts are labeled, 12 labels are missing" in " ".join(
        first.stderr.split()
    )
    assert f"rlhf label --run-dir {run_dir}" in " ".join(first.stderr.split())
    assert (run_dir / "sft").is_dir()
    assert not (run_dir / "label").exists()

    assert label(run_dir, most=5) == 5
    joined = rlhf("label", "--run-dir", run_dir, code=2)  # no terminal here, and nobody asked for a browser
    assert "needs an interactive terminal" in joined.stderr
    second = command("--force", "label", code=EXIT_WAITING)  # samples are thrown away and drawn again, no label is
    assert "5 of 12 prompts are labeled" in " ".join(second.stderr.split())

    label(run_dir, most=100)
    done = command("--json")
    assert "sampling completions: 0 completions" in done.stderr, "completions were sampled again"
    stages = {row["name"]: row for row in json.loads(done.stdout)["stages"]}
    assert {name: row["status"] for name, row in stages.items()} == {
        "sft": "cached",
        **dict.fromkeys(("label", "train-rm", "ppo", "evaluate"), "done"),
    }
    assert stages["label"]["metrics"]["labels"] == 12
    rankings = [json.loads(line) for line in (run_dir / "label" / "rankings.jsonl").read_text().splitlines()]
    for row in rankings:
        lengths = [[len(row["completions"][index]) for index in tier] for tier in row["ranking"]]
        assert lengths == sorted(lengths)
        assert row["annotator"] == "Ann"

    assert all(row["status"] == "cached" for row in json.loads(command("--json").stdout)["stages"])
    assert "`label` is done" in rlhf("label", "--run-dir", run_dir).stderr
