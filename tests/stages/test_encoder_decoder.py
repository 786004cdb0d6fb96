"""An encoder-decoder of 2017's parts, made from nothing, goes through every stage that a policy goes through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.build import build_model
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.settings.shared import BuildSettings

RECIPE = """
model:
  precision: float32
  threads: 1
  build:
    {architecture: encoder-decoder, positions: sinusoidal, norm: layer, norm_placement: post, feed_forward: relu,
     biases: feed-forward, tied_embeddings: true, hidden_size: 16, layers: 1, heads: 2, feed_forward_size: 32,
     vocab_size: 300, context_length: 64}
data: {prompts: prompts.jsonl, holdout: 0.3}
sft: {data: demonstrations.jsonl, adapter: none, batch_size: 8, max_length: 64}
label: {by: function, function: "judge.py:score", completions_per_prompt: 2, sampling: {max_new_tokens: 4}}
ppo: {steps: 2, prompts_per_step: 4, max_new_tokens: 4, rewards: [{function: "judge.py:score"}]}
evaluate: {judge_function: "judge.py:score", shown_samples: 2, sampling: {max_new_tokens: 4}}
"""


def test_sft_label_ppo_and_evaluate(tmp_path: Path, rlhf: Callable[..., object]):
    prompts = [f"Question {number}?" for number in range(20)]
    lines = {
        "prompts": [{"prompt": prompt} for prompt in prompts],
        "demonstrations": [{"prompt": prompt, "completion": "An answer."} for prompt in prompts],
    }
    for name, records in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "judge.py").write_text(
        "def score(prompts, completions):\n    return [c.count('a') for c in completions]\n"
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rlhf("run", "recipe.yaml", "--run-dir", "run")
    samples = [json.loads(line) for line in (tmp_path / "run/evaluate/samples.jsonl").read_text().splitlines()]
    assert sum("base" in sample for sample in samples) == 2, "the untrained model was made again"
    config = json.loads((tmp_path / "run/ppo/config.json").read_text())
    assert (config["architecture"], config["positions"]) == ("encoder-decoder", "sinusoidal")


@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("attention", ["torch", "sdpa"])
def test_the_untrained_model_is_the_built_one_in_its_attention_and_precision(
    architecture: str, attention: str, tmp_path: Path
):
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "feed_forward_size": 16, "context_length": 32}
    build_model(tmp_path, ["some text"], BuildSettings(vocab_size=260, architecture=architecture, **sizes), seed=3)
    source = ModelSource(str(tmp_path), attention=attention, dtype=torch.bfloat16)
    sampling = Sampling()
    policies = Policy.load(source, sampling), Policy.untrained(source, sampling, seed=3)
    built, again = (policy.model().__enter__() for policy in policies)
    assert type(built) is type(again)
    assert again.config._attn_implementation == built.config._attn_implementation
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(built.parameters(), again.parameters(), strict=True))
