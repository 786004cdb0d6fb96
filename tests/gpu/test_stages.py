"""Every stage on a fake GPU: nothing is left on the CPU, and the results are those of the CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import guard
from tests.gpu.inputs import options, recipe, write_inputs
from tests.gpu.running import ROOT, Host, environment

STAGES = ("sft", "label", "train-rm", "ppo", "evaluate")
IN_FULL = {
    "sft.adapter": "none",
    "train_rm.adapter": "none",
    "ppo.adapter": "none",
    "ppo.ptx": {"data": "demonstrations.jsonl", "batch_size": 2},
}
FAMILIES = {"lora": ("tiny_llama", {}), "in full": ("tiny_llama", IN_FULL), "encoder-decoder": ("tiny_t5", {})}
"""What is trained -> fixture of the model, and settings."""
REWARD = ("--prompts", "prompts.jsonl", "--function", "gold.py:score")


def metrics(folder: Path, stage: str) -> dict[str, Any]:
    """Metrics of an artifact of the run `gpu`."""
    return json.loads((folder / "runs" / "gpu" / stage / "manifest.json").read_text())["metrics"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_run_gives_what_the_cpu_gives(
    family: str, gpu: Host, tiny_llama: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    fixture, changes = FAMILIES[family]
    if family == "encoder-decoder":  # which cannot be a reward model
        changes = {"train_rm.model": str(tiny_llama)}
    text = recipe(request.getfixturevalue(fixture), changes)
    found = {}
    for device in ("cuda", "cpu"):
        folder = write_inputs(tmp_path / device)
        (folder / "recipe.yaml").write_text(text)
        outcome = gpu.command(folder, "run", "recipe.yaml", "--set", f"model.device={device}")
        assert bool(outcome.peak) == (device == "cuda")
        found[device] = {stage: metrics(folder, stage) for stage in STAGES}
    for stage in STAGES:
        on_cpu = {name: value for name, value in found["cpu"][stage].items() if isinstance(value, (int, float))}
        on_gpu = {name: found["cuda"][stage][name] for name in on_cpu}
        if stage in ("sft", "label"):
            assert on_gpu == pytest.approx(on_cpu, rel=1e-3, abs=1e-4), stage
        else:  # the new reward head is drawn from the device's own random numbers
            assert all(map(math.isfinite, on_gpu.values())), (stage, on_gpu)


def test_a_quantized_model_trains_or_is_refused_with_the_reason(gpu: Host, tiny_llama: Path, tmp_path: Path):
    write_inputs(tmp_path)
    data = ("--model", tiny_llama, "--data", "demonstrations.jsonl")
    outcome = gpu.command(tmp_path, "sft", *data, *options("sft", {"model.quantize": "4bit"}), code=None)
    assert outcome.code == 0 or ("`model.quantize: 4bit`" in outcome.stderr and not outcome.raised), outcome.stderr


def interrupted_ppo(gpu: Host, folder: Path, model: Path, device: str) -> list[str]:
    """Stop a PPO run after its first step; returns the command to resume it."""
    write_inputs(folder)
    (folder / "interrupt").touch()
    command = ["ppo", "--model", str(model), *REWARD, *options("ppo")]
    gpu.command(folder, *command, "--set", f"model.device={device}", code=143)
    return command


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("cpu", "cuda", "the checkpoint was written without a GPU, whose generator is seeded"),
        ("cuda", "cpu", "that of the checkpoint's GPU is dropped"),
    ],
)
def test_a_run_resumes_on_another_device(before, after, said, gpu: Host, tiny_llama: Path, tmp_path: Path):
    command = interrupted_ppo(gpu, tmp_path, tiny_llama, before)
    outcome = gpu.command(tmp_path, *command, "--set", f"model.device={after}")
    assert "resuming from step 1 of 2" in outcome.stderr
    assert said in outcome.stderr


def on_two_gpus(folder: Path, *arguments: str) -> str:
    """Run a command in two processes with a fake GPU each; returns its messages."""
    library = str(guard.build())
    paths = os.pathsep.join([str(Path(__file__).with_name("startup")), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-m", "rlhf_cli", *arguments, "--processes", "2"],
        cwd=folder,
        env=environment() | {"RLHF_FAKE_GPU": library, "PYTHONPATH": paths, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_a_run_on_one_gpu_resumes_on_two(gpu: Host, tiny_llama: Path, tmp_path: Path):
    command = interrupted_ppo(gpu, tmp_path, tiny_llama, "cuda")
    messages = on_two_gpus(tmp_path, *command, "--set", "model.device=cuda")
    assert "resuming from step 1 of 2" in messages
    assert "1 of 2 processes are new, and seeded" in messages


def test_two_gpus_give_what_one_gives(gpu: Host, tiny_llama: Path, tmp_path: Path):
    text = recipe(tiny_llama, {"ppo.steps": 1})
    found = {}
    for count in (1, 2):
        folder = write_inputs(tmp_path / str(count))
        (folder / "recipe.yaml").write_text(text)
        if count == 1:
            gpu.command(folder, "run", "recipe.yaml", "--set", "model.device=cuda")
        else:
            on_two_gpus(folder, "run", "recipe.yaml", "--set", "model.device=cuda")
        found[count] = {stage: metrics(folder, stage) for stage in STAGES}
    for stage in STAGES:
        one = {name: value for name, value in found[1][stage].items() if isinstance(value, (int, float))}
        assert {name: found[2][stage][name] for name in one} == pytest.approx(one, rel=5e-3, abs=1e-3), stage
