"""What stages write is the same by hub id as by folder: rewards, templates, contracts, the policy PPO wrote."""

from __future__ import annotations

import json

import pytest

from tests.hub_server import COMMIT, hub_server

SHORT = ("--set", "data.holdout=0.5", "--set", "model.precision=float32")
EVALUATE = (
    "--set",
    "evaluate.max_prompts=4",
    "--set",
    "evaluate.trained_prompts=skip",
    "--set",
    "evaluate.sampling.max_new_tokens=6",
)


@pytest.mark.slow
def test_artifacts_by_hub_id_are_those_by_folder(rlhf, tmp_path, tiny_llama):
    rows = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    template = ("--set", r'data.prompt_template="Q: {prompt}\nA:"')
    rlhf("train-rm", "--model", tiny_llama, "--data", "pairs.jsonl", "--run-dir", "run", *SHORT, *template)
    steps = ("--set", "ppo.steps=1", "--set", "ppo.prompts_per_step=4", "--set", "ppo.max_new_tokens=6")
    ppo = ("--prompts", "prompts.jsonl", *SHORT, *steps)
    rlhf("ppo", "--model", tiny_llama, "--run-dir", "run", *ppo, *template)
    run = tmp_path / "run"
    with hub_server() as server:
        server.models |= {"acme/base": tiny_llama, "acme/rm": run / "train-rm", "acme/ppo": run / "ppo"}
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf")}
        offline = online | {"HF_HUB_OFFLINE": "1"}
        found = {}
        for name, policy, reward, env in (
            ("folder", run / "ppo", run / "train-rm", None),
            ("hub", "acme/ppo", "acme/rm", online),
            ("cache", f"acme/ppo@{COMMIT}", "acme/rm@main", offline),
        ):
            models = ("--baseline", run / "ppo", "--policy", policy, "--reward-model", reward)
            rlhf("evaluate", *models, "--prompts", "prompts.jsonl", "--run-dir", name, *SHORT, *EVALUATE, env=env)
            found[name] = json.loads((tmp_path / name / "evaluate" / "metrics.json").read_text())
        assert found["folder"] == found["hub"] == found["cache"]
        assert not [path for path in server.requests if "/critic/" in path]
        rlhf("ppo", "--model", "acme/ppo", "--reward-model", "acme/rm", "--run-dir", "next", *ppo, env=online)
    contract = json.loads((tmp_path / "next" / "ppo" / "contract.json").read_text())
    assert contract["prompt_template"] == "Q: {prompt}\nA:"
    base = json.loads((tmp_path / "next" / "ppo" / "adapter" / "base.json").read_text())
    assert (base["path"], base["revision"]) == ("acme/ppo", COMMIT)
