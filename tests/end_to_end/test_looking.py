"""What a person has to look at after PPO, through the real command: curves, findings, answers, a tracker's run."""

from __future__ import annotations

import json

from rlhf_cli.training.monitoring.metrics_log import read_rows


def test_a_ppo_run_can_be_looked_at(tiny_llama, tmp_path, rlhf):
    texts = ["What is bread?", "Why is the sky blue?", "The cat sat", "First heat", "A short answer", "One", "Two"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    (tmp_path / "reward.py").write_text("def score(prompts, completions):\n    return [len(c) for c in completions]\n")
    settings = {
        "ppo.rewards": '[{"function": "reward.py:score"}]',
        "ppo.steps": 2,
        "ppo.prompts_per_step": 4,
        "ppo.max_new_tokens": 6,
        "ppo.epochs": 1,
        "ppo.eval_steps": 1,
        "ppo.show_steps": 2,
        "ppo.shown_prompts": 1,
        "data.holdout": 0.5,
        "model.precision": "float32",
        "tracking.trackers": "[tensorboard]",
    }
    arguments = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    result = rlhf("ppo", "--model", tiny_llama, "--prompts", "prompts.jsonl", *arguments)

    run = tmp_path / "runs" / "default"
    rows = read_rows(run / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert sum(rows[1]["histograms"]["reward"]["counts"]) == 4
    assert [row["step"] for row in read_rows(run / "ppo" / "samples.jsonl")] == [0, 2]
    assert "completions after step 2" in result.stderr
    assert json.loads((run / "ppo" / "health.json").read_text())["verdict"] in ("fine", "look", "bad")
    assert "is the curve normal?" in result.stderr
    assert (run / "ppo" / "curves.png").read_bytes().startswith(b"\x89PNG")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tracking" / "ppo"))
    found.Reload()
    assert [event.step for event in found.Scalars("objective/kl")] == [1, 2]
    assert [event.step for event in found.Scalars("eval/objective/kl")] == [0, 1, 2]
    assert found.Histograms("histograms/length")[-1].step == 2
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "command.txt",
        "environment.json",
        "log.txt",
        "ppo",
        "recipes",
        "tracking",
    }
