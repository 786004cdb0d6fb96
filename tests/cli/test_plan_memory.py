"""The peak memory of stages, in processes of their own, beside what `rlhf plan` says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_cli.pipeline.plan import plan_run
from rlhf_cli.pipeline.selection import Selection
from rlhf_cli.recipe.loader import load_recipe
from tests.conftest import EOS, SENTENCES, byte_level_tokenizer

ROOT = Path(__file__).parents[2]
STAGES = ("sft", "train-rm", "ppo")
# A process starts with the peak of the one that forked it, and that of the tests is high: a small one is between.
MEASURE = (
    "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted in another way"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 13 million weights: trained in full, 0.2 GB beside the 0.6 of the process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_level_tokenizer(chat=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_stages_take_the_memory_that_their_plan_says(adapter, model: Path, tmp_path: Path):
    rows = [{"prompt": f"{text} {number}?", "completion": text} for number in range(4) for text in SENTENCES]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " No."} for row in rows]
    for name, content in (("rows", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {model}, precision: float32, device: cpu, threads: 1}}\n"
        "data: {prompts: rows.jsonl, holdout: 0.3}\nsampling: {max_new_tokens: 16}\n"
        f"sft: {{data: rows.jsonl, adapter: {adapter}, batch_size: 8}}\n"
        f"train_rm: {{data: pairs.jsonl, adapter: {adapter}, batch_size: 8}}\n"
        f"ppo: {{adapter: {adapter}, steps: 2, prompts_per_step: 8, epochs: 1}}\n"
    )
    run = tmp_path / "run"
    ratios = {}
    for stage in STAGES:
        (planned,) = plan_run(load_recipe(recipe, []), run, Selection(stage, stage), trial=False).stages
        assert planned.memory is not None
        ratios[stage] = planned.memory.total / peak_of("run", recipe, "--from", stage, "--to", stage, "--run-dir", run)
    assert all(0.85 < ratio < 1.15 for ratio in ratios.values()), ratios


def peak_of(*arguments: object) -> int:
    """Run `rlhf` in a process of its own and return its peak resident memory in bytes."""
    command = [sys.executable, "-c", MEASURE, sys.executable, "-m", "rlhf_cli", *map(str, arguments)]
    variables = os.environ | {"CI": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.splitlines()[-1])
