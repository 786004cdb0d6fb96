"""`rlhf overopt` through the real command, in small: all parts, skipped when finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "model.build.hidden_size=32", "model.build.layers=1", "model.build.feed_forward_size=32",
    "sampling.max_new_tokens=8", "sft.epochs=0.05", "label.completions_per_prompt=3", "train_rm.epochs=1",
    "ppo.steps=4", "ppo.prompts_per_step=16", "overopt.labels=8", "overopt.multiples=[1,2]", "overopt.noise=[0.25]",
    "overopt.seeds=2", "overopt.eval_steps=2", "overopt.eval_prompts=6", "overopt.samples_per_prompt=4",
)  # fmt: skip


def command(*changes: str) -> list[str]:
    settings = [part for setting in (*SMALL, *changes) for part in ("--set", setting)]
    return ["overopt", str(ROOT / "recipes" / "overopt.yaml"), "--run-dir", "study", *settings]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_is_made_of_runs_and_is_resumed(rlhf, tmp_path):
    done = rlhf(*command(), "--json", timeout=500)
    found = json.loads(done.stdout)
    folder = tmp_path / "study"
    assert json.loads((folder / "overopt.json").read_text()) == found
    assert [(proxy["labels"], proxy["noise"]) for proxy in found["proxies"]] == [(8, 0.25), (16, 0.25)]
    for proxy in found["proxies"]:
        assert [point["n"] for point in proxy["best_of_n"]["points"]] == [1, 2, 4]
        assert [point["step"] for point in proxy["ppo"]["points"]] == [0, 2, 4]
        assert proxy["ppo"]["points"][0]["kl"]["value"] == pytest.approx(0.0, abs=1e-3)
        assert proxy["ppo"]["points"][0]["gold"]["value"] == 0.0
        assert len(proxy["accuracy"]) == 2
    samples = (folder / "base" / "best-of-n" / "samples.jsonl").read_text().splitlines()
    assert [len(samples), len(json.loads(samples[0])["completions"])] == [6, 4]
    checkpoints = (folder / "2x-noise-0.25" / "seed-1" / "ppo-samples.jsonl").read_text().splitlines()
    assert [len(checkpoints), len(json.loads(checkpoints[0])["completions"])] == [6, 3]
    manifests = sorted(folder.rglob("manifest.json"))
    assert len(manifests) == 3 + 4 * 4, "sft, label and best-of-n; for each proxy and seed 3 stages and gold scores"
    assert (folder / "overopt-noise-0.25.png").is_file()
    assert "completions after step" not in done.stderr, "messages of the parts are in their logs"
    assert "completions after step" in (folder / "1x-noise-0.25" / "seed-0" / "log.txt").read_text()
    times = [path.stat().st_mtime_ns for path in manifests]
    (folder / "overopt.json").unlink()
    again = rlhf(*command(), timeout=300)
    assert again.stdout == "study/overopt.json\n"
    assert json.loads((folder / "overopt.json").read_text()) == found
    assert [path.stat().st_mtime_ns for path in manifests] == times


@pytest.mark.slow
def test_what_a_study_needs_is_said(rlhf):
    recipe = str(ROOT / "recipes" / "overopt.yaml")
    said = rlhf("overopt", recipe, "--set", "train_rm=null", code=2).stderr
    assert "`rlhf overopt` needs the section `train_rm` of the recipe" in said
    said = rlhf("overopt", recipe, "--set", "label={by: human}", code=2).stderr
    assert "`label.by: human` cannot be the gold reward" in said
    said = rlhf("overopt", recipe, "--set", "data.prompts=null", code=2).stderr
    assert "`rlhf overopt` needs `data.prompts`" in said
    said = rlhf("overopt", recipe, "--set", "overopt.noise=[0.5]", code=2).stderr
    assert "overopt.noise" in said
