"""Bytes that the stages hold on a fake GPU, against what `--dry-run` says they need."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.inputs import options, write_inputs
from tests.gpu.running import Host, Outcome

FACTOR = 1.6
"""The estimate is at most this factor above or below the peak: what operations save depends on the model."""
REWARD = ("--prompts", "prompts.jsonl", "--function", "gold.py:score")


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose weights and activations are larger than tables, masks and optimizer steps: 2.2 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import byte_level_tokenizer

    tokenizer = byte_level_tokenizer(chat=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("models") / "small-llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


PROMPTS = [f"{number} the cat sat on a warm stone" for number in range(10, 22)]
COMPLETIONS = (" watched how bread is baked" * 4, " and the warm stone near it" * 4)
SAMPLED = 24


def write_long_texts(folder: Path, model: Path) -> dict[str, Any]:
    """Write data whose texts are all equally long, and return the settings that say how long, as a user knows it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    chosen, rejected = COMPLETIONS
    rows = {
        "prompts": [{"prompt": prompt} for prompt in PROMPTS],
        "demonstrations": [{"prompt": prompt, "completion": chosen} for prompt in PROMPTS],
        "rankings": [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt in PROMPTS],
    }
    write_inputs(folder)
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    message = [{"role": "user", "content": PROMPTS[0]}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    prompt = len(tokenizer(text).input_ids)
    longest = prompt + max(len(tokenizer(text).input_ids) for text in COMPLETIONS) + 2
    return {
        "data.max_prompt_tokens": prompt,
        "data.holdout": 0.2,
        "sampling.max_new_tokens": SAMPLED,
        "sft.max_length": longest,
        "sft.micro_batch_size": 4,
        "train_rm.max_length": longest,
        "train_rm.micro_batch_size": 4,
        "ppo.micro_batch_size": 4,
        "ppo.steps": 1,
    }


COMMANDS: dict[str, tuple[str, ...]] = {
    "sft": ("--data", "demonstrations.jsonl"),
    "train-rm": ("--data", "rankings.jsonl"),
    "ppo": REWARD,
    "label": ("--prompts", "prompts.jsonl"),
}


def estimated(stderr: str) -> float:
    """Bytes in the line of a dry run."""
    found = re.search(r"needs up to about ([\d.,]+) (bytes|kB|MB|GB) on a GPU", stderr)
    assert found is not None, stderr
    return float(found[1].replace(",", "")) * {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[found[2]]


@pytest.mark.parametrize(
    ("stage", "adapter", "recomputes"),
    [
        ("sft", "lora", False),
        ("sft", "lora", True),
        ("sft", "none", False),
        ("train-rm", "lora", False),
        ("train-rm", "lora", True),
        ("ppo", "lora", False),
        ("ppo", "none", False),
        ("label", None, False),
    ],
)
def test_the_peak_is_near_what_a_dry_run_says(stage, adapter, recomputes, gpu: Host, small_llama: Path, tmp_path: Path):
    section = stage.replace("-", "_")
    lengths = write_long_texts(tmp_path, small_llama)
    own = (section, "data", "sampling")
    changes = {name: value for name, value in lengths.items() if name.split(".")[0] in own}
    changes |= {} if adapter is None else {f"{section}.adapter": adapter}
    changes |= {f"{section}.gradient_checkpointing": True} if recomputes else {}
    command = [stage, "--set", f"model.path={small_llama}", *COMMANDS[stage], *options(stage, changes)]
    needed = estimated(gpu.command(tmp_path, *command, "--dry-run").stderr)
    outcome = gpu.command(tmp_path, *command, follow=True)
    largest = sorted(outcome.largest.items(), key=lambda item: -item[1])[:12]
    assert needed / FACTOR <= outcome.peak <= needed * FACTOR, (needed, outcome.peak, largest)


def test_a_reference_that_is_offloaded_frees_its_weights_and_changes_nothing(
    gpu: Host, small_llama: Path, tmp_path: Path
):
    lengths = write_long_texts(tmp_path, small_llama)
    changes = {name: value for name, value in lengths.items() if name.split(".")[0] in ("ppo", "data", "sampling")}
    needed, peaks, found = {}, {}, {}
    for offloads in (False, True):
        own = options("ppo", changes | {"ppo.adapter": "none", "ppo.offload_frozen": offloads})
        command = ["ppo", "--set", f"model.path={small_llama}", *REWARD, *own, "--run-dir", tmp_path / str(offloads)]
        needed[offloads] = estimated(gpu.command(tmp_path, *command, "--dry-run").stderr)
        peaks[offloads] = gpu.command(tmp_path, *command).peak
        found[offloads] = (tmp_path / str(offloads) / "ppo" / "metrics.jsonl").read_bytes()
    assert found[True] == found[False]
    weights = (small_llama / "model.safetensors").stat().st_size
    assert peaks[False] - peaks[True] > 0.9 * weights
    assert needed[False] - needed[True] == pytest.approx(weights, rel=0.1)


def peak_of_ppo(gpu: Host, folder: Path, model: Path, steps: int, **request: Any) -> Outcome:
    """Run PPO for some steps."""
    changes = {"ppo.steps": steps, "ppo.checkpoint_steps": 9, "ppo.schedule": "constant"}
    return gpu.command(write_inputs(folder), "ppo", "--model", model, *REWARD, *options("ppo", changes), **request)


def check_growth(few: Outcome, many: Outcome) -> None:
    """Fail where more steps took more memory."""
    assert many.peak <= 1.05 * few.peak, f"memory grows from step to step: {few.peak} bytes, then {many.peak}"


def test_more_steps_take_no_more_memory(gpu: Host, tiny_llama: Path, tmp_path: Path):
    check_growth(*(peak_of_ppo(gpu, tmp_path / str(steps), tiny_llama, steps) for steps in (1, 3)))
