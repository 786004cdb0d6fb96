"""PPO with a vLLM server: the weights it draws with, the correction, a server that is lost, and rollouts ahead."""

from __future__ import annotations

import json

import pytest

from rlhf_cli.errors import Interrupted, ServerLostError, UsageError
from rlhf_cli.generation.server_generator import VLLMServerGenerator
from rlhf_cli.generation.vllm_server import VLLMServer
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.shared import GenerationSettings
from tests.generation.server_stand_in import server_of, vllm
from tests.generation.test_vllm_generator import policy_at

__all__ = ["server_of", "vllm"]

CHANGES = {"checkpoint_steps": 50, "max_new_tokens": 4, "prompts_per_step": 4, "epochs": 1, "learning_rate": 0.1}


@pytest.fixture
def run(server_of, tiny_llama, tmp_path, make_trainer):
    """Trains in a folder of `tmp_path`, with a server of its own unless one is given."""

    def run(name: str, server=None, *, stop=None, patience=20.0, **changes):
        server = server or server_of(tiny_llama)
        settings = GenerationSettings(vllm_server=server.url, server_timeout=20.0)
        like = policy_at(tiny_llama, max_new_tokens=CHANGES["max_new_tokens"])
        generator = VLLMServerGenerator(settings, like, longest_prompt=32)
        trainer = make_trainer(tiny_llama, tmp_path / name, generator=generator, stop=stop, **CHANGES | changes)
        generator.start(trainer.policy)
        generator._server._patience = patience  # of a server that is lost, not of a request
        trainer.train()
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    return run


def test_a_rollout_has_the_weights_before_its_update_and_importance_weights_of_one(run, server_of, tiny_llama):
    server = server_of(tiny_llama)
    rows = run("whole", server)
    assert server.paths.count("/start_weight_update") == 4, "at the start and before each step"
    assert rows[-1]["objective/kl_per_token"] != pytest.approx(0.0, abs=1e-3), "the policy has moved"
    for row in rows:
        assert row["generation/drift_kl"] == pytest.approx(0.0, abs=1e-4)
        assert row["generation/importance_weight"] == pytest.approx(1.0, abs=1e-3)
        assert row["generation/truncated"] == 0.0


def test_weights_that_did_not_arrive_are_seen_and_corrected(run, monkeypatch):
    """An engine that keeps its first weights: the drift grows, and weights are cut off."""
    take, taken = VLLMServer.take, []

    def once(self, weights):
        if not taken:
            take(self, weights)
        taken.append(self.weights)

    monkeypatch.setattr(VLLMServer, "take", once)
    rows = run("stale", importance_cap=1.1, learning_rate=0.5)
    assert rows[0]["generation/drift_kl"] == pytest.approx(0.0, abs=1e-4)
    assert rows[-1]["generation/drift_max"] > 0.05
    assert rows[-1]["generation/importance_weight"] != pytest.approx(1.0, abs=1e-3)


def test_a_run_that_lost_its_server_saves_the_steps_before_and_resumes_to_the_same_end(
    run, server_of, tiny_llama, tmp_path, capsys
):
    expected = run("whole")
    server = server_of(tiny_llama)
    server.dies_after = 2 + 2 * CHANGES["prompts_per_step"] + 1  # in the third step
    with pytest.raises(ServerLostError, match="has not responded"):
        run("cut", server, patience=0.1)
    assert "2 of 3 steps are saved" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "cut" / "step-00000002").is_dir()
    assert run("cut") == expected


def test_rollouts_that_overlap_with_the_update_are_one_step_off_policy_and_corrected(run, server_of, tiny_llama):
    server = server_of(tiny_llama)
    server.pause = 0.02
    rows, on_policy = run("ahead", server, overlap_rollouts=True), run("on-policy")
    assert [row["generation/stale"] for row in rows] == [0.0, 1.0, 1.0]
    assert "generation/stale" not in on_policy[0]
    assert rows[0].items() >= on_policy[0].items()
    for row in rows[1:]:
        assert row["generation/drift_max"] > 1e-2
        assert row["generation/importance_weight"] != pytest.approx(1.0, abs=1e-4)
    assert rows[1]["objective/kl"] != on_policy[1]["objective/kl"]


def test_a_run_that_draws_ahead_resumes_with_what_was_drawn(run, stop_after, tmp_path):
    expected = run("whole", overlap_rollouts=True)
    with pytest.raises(Interrupted):
        run("cut", overlap_rollouts=True, stop=stop_after(1))
    assert run("cut", overlap_rollouts=True) == expected


def test_what_a_lost_server_did_not_draw_ahead_is_drawn_with_the_new_policy(run, server_of, tiny_llama, capsys):
    server = server_of(tiny_llama)
    server.dies_after, server.comes_back = 2 + CHANGES["prompts_per_step"] + 1, 0.0
    rows = run("lost", server, overlap_rollouts=True)
    assert [row["generation/stale"] for row in rows] == [0.0, 0.0, 1.0]
    assert rows[1]["generation/drift_kl"] == pytest.approx(0.0, abs=1e-4)
    assert "was lost" in " ".join(capsys.readouterr().err.split())


def test_rollouts_cannot_overlap_without_a_server_or_a_correction(make_trainer, tiny_llama, tmp_path):
    ppo = {"rewards": [{"function": "f.py:f"}], "overlap_rollouts": True}
    with pytest.raises(ValueError, match=r"`ppo\.overlap_rollouts` needs `generation\.vllm_server`"):
        Recipe.model_validate({"ppo": ppo})
    with pytest.raises(ValueError, match=r"needs `ppo\.importance_cap`"):
        Recipe.model_validate({"ppo": ppo | {"importance_cap": None}})
    with pytest.raises(UsageError, match="another engine draws the completions"):
        make_trainer(tiny_llama, tmp_path / "torch", overlap_rollouts=True)
