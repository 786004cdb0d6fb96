"""Rewards in a pipeline: which parts count as inputs, and what is checked before the first stage."""

from __future__ import annotations

import json

import pytest

COPY = "copy/model.safetensors"


def rewards(*entries: dict, combination: str | None = None) -> list[str]:
    chosen = [] if combination is None else ["--set", f"ppo.reward_combination={combination}"]
    return ["--set", f"ppo.rewards={json.dumps(entries)}", *chosen]


@pytest.fixture
def with_copy(toy):
    toy.write("copy/config.json", "{}")
    toy.write(COPY, "weights of a reward model")
    return toy


def test_functions_and_endpoints_are_reported_before_the_first_stage(with_copy):
    entries = {"function": "gold.py:score"}, {"model": "copy"}, {"url": "https://user.example/score"}
    outcome = with_copy.run(*rewards(*entries), "--dry-run")
    assert outcome.code == 0
    assert "(sha256 of gold.py: " in outcome.stderr
    assert "ppo.rewards.2.url: will send prompts and completions to https://user.example/score\n" in outcome.stderr


@pytest.mark.parametrize(
    ("entry", "code", "said"),
    [
        ({"model": "./nowhere"}, 65, "./nowhere: no such model folder (`ppo.rewards.0.model`)"),
        ({"model": "gold.py"}, 65, "gold.py: is a file, not a model folder"),
        ({"url": "http://host:99999/"}, 2, "`ppo.rewards.0.url`: `http://host:99999/` is not a valid URL"),
        ({"url": "https://me:word@host/"}, 2, "`ppo.rewards.0.url`: the URL https://host/ has a name or pass"),
        (
            {"url": "https://host/", "token_env": "NO_SUCH_TOKEN"},
            2,
            "the environment variable NO_SUCH_TOKEN, which holds the token ",
        ),
    ],
)
def test_invalid_rewards_are_found_before_the_first_stage(toy, entry, code, said):
    outcome = toy.run(*rewards(entry))
    assert outcome.code == code
    assert said in outcome.stderr
    assert "hint: " in outcome.stderr
    assert toy.ran() == []


def test_a_token_is_in_no_output_and_no_file_and_a_finished_stage_needs_none(toy):
    entry = {"url": "https://host/score", "token_env": "REWARD_TOKEN"}
    outcome = toy.run(*rewards(entry), REWARD_TOKEN="sesame-open")
    assert outcome.code == 0
    assert "sesame-open" not in outcome.stdout + outcome.stderr
    files = [path for path in toy.run_dir.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"sesame-open" in path.read_bytes()]
    patient = entry | {"timeout": 99.0, "retries": 9, "request_size": 7}  # which changes no result
    assert set(toy.run(*rewards(patient), "--dry-run").statuses.values()) == {"cached"}


def test_ppo_runs_again_when_a_reward_changes(with_copy):
    def status(*entries: dict) -> str:
        statuses = with_copy.run(*rewards(*entries), "--dry-run").statuses
        assert statuses["train-rm"] == "cached"
        return statuses["ppo"]

    with_copy.run(*rewards({"model": "copy"}))
    assert status({"model": "copy"}) == "cached"
    assert status({"model": "copy", "weight": 0.5}) == "would run"
    assert status({"url": "https://host/score"}) == "would run"
    assert status({"model": "copy"}, {"function": "gold.py:score"}) == "would run"
    with_copy.write(COPY, "other weights")
    assert status({"model": "copy"}) == "would run"


def test_a_combination_of_one_reward_has_no_effect_and_is_refused(toy):
    alone = ["--set", "train_rm=null", "--set", "label=null"]
    outcome = toy.run(*rewards({"function": "gold.py:score"}, combination="min"), *alone)
    assert outcome.code == 2
    assert "`ppo.reward_combination: min` has no effect on a single reward" in outcome.stderr
    beside_a_reward_model = toy.run(*rewards({"function": "gold.py:score"}, combination="min"), "--dry-run")
    assert beside_a_reward_model.code == 0


def test_a_function_from_a_downloaded_repository_is_refused(toy, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(toy.folder / "hub"))
    snapshot = "hub/models--acme--reward/snapshots/0123"
    toy.write(f"{snapshot}/config.json", "{}")
    toy.write(f"{snapshot}/reward.py", "raise SystemExit('this ran')\n")
    outcome = toy.run(*rewards({"function": f"{snapshot}/reward.py:score"}))
    assert outcome.code == 2
    assert "was downloaded from the hub" in outcome.stderr
    assert "this ran" not in outcome.stderr
    assert toy.ran() == []
