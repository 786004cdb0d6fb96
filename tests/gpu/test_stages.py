"""Every stage on a fake GPU: nothing is left on the CPU, and the results are those of the CPU."""

from __future__ import annotations

import json
import math
import os
import shutil
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
FAMILIES = {
    "lora": ("tiny_llama", {"ppo.steps": 1}),
    "in full": ("tiny_llama", IN_FULL),
    "encoder-decoder": ("tiny_t5", {}),
}
"""What is trained -> fixture of the model, and settings."""
REWARD = ("--prompts", "prompts.jsonl", "--function", "gold.py:score")


def metrics(folder: Path, stage: str) -> dict[str, Any]:
    """Metrics of an artifact of the run `gpu`."""
    return json.loads((folder / "runs" / "gpu" / stage / "manifest.json").read_text())["metrics"]


def whole_run(gpu: Host, folder: Path, text: str, device: str) -> dict[str, dict[str, Any]]:
    """Run a recipe on a device; returns the metrics of its stages."""
    write_inputs(folder)
    (folder / "recipe.yaml").write_text(text)
    outcome = gpu.command(folder, "run", "recipe.yaml", "--set", f"model.device={device}")
    assert bool(outcome.peak) == (device == "cuda")
    return {stage: metrics(folder, stage) for stage in STAGES}


@pytest.fixture(scope="module")
def lora_on_gpu(gpu: Host, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Metrics on one GPU, for the CPU and for two GPUs to be compared with."""
    return whole_run(gpu, tmp_path_factory.mktemp("lora"), recipe(tiny_llama, FAMILIES["lora"][1]), "cuda")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_run_gives_what_the_cpu_gives(
    family: str, gpu: Host, tiny_llama: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    fixture, changes = FAMILIES[family]
    if family == "encoder-decoder":  # which cannot be a reward model
        changes = {"train_rm.model": str(tiny_llama)}
    text = recipe(request.getfixturevalue(fixture), changes)
    found = {"cpu": whole_run(gpu, tmp_path / "cpu", text, "cpu")}
    if family == "lora":
        found["cuda"] = request.getfixturevalue("lora_on_gpu")
    else:
        found["cuda"] = whole_run(gpu, tmp_path / "cuda", text, "cuda")
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


@pytest.fixture(scope="module")
def interrupted_on_gpu(gpu: Host, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of such a run on one GPU, for tests to copy, and the command."""
    folder = tmp_path_factory.mktemp("interrupted")
    return folder, interrupted_ppo(gpu, folder, tiny_llama, "cuda")


def check_resumed(gpu: Host, folder: Path, command: list[str], device: str, said: str) -> None:
    """Resume a run on a device that it did not begin on."""
    outcome = gpu.command(folder, *command, "--set", f"model.device={device}")
    assert "resuming from step 1 of 2" in outcome.stderr
    assert said in outcome.stderr


def test_a_run_without_a_gpu_resumes_on_one(gpu: Host, tiny_llama: Path, tmp_path: Path):
    command = interrupted_ppo(gpu, tmp_path, tiny_llama, "cpu")
    said = "the checkpoint was written without a GPU: the GPU's generator is seeded"
    check_resumed(gpu, tmp_path, command, "cuda", said)


def test_a_run_on_a_gpu_resumes_without_one(gpu: Host, interrupted_on_gpu: tuple[Path, list[str]], tmp_path: Path):
    folder, command = interrupted_on_gpu
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    check_resumed(gpu, tmp_path, command, "cpu", "that of the checkpoint's GPU is dropped")


def on_two_gpus(folder: Path, *arguments: str) -> str:
    """Run a command in two processes with a fake GPU each; returns its messages."""
    library = str(guard.build())
    paths = os.pathsep.join([str(Path(__file__).with_name("startup")), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-m", "rlhf_cli", *arguments, "--processes", "2"],
        cwd=folder,
        env=environment(2) | {"RLHF_FAKE_GPU": library, "PYTHONPATH": paths, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_a_run_on_one_gpu_resumes_on_two(interrupted_on_gpu: tuple[Path, list[str]], tmp_path: Path):
    folder, command = interrupted_on_gpu
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    messages = on_two_gpus(tmp_path, *command, "--set", "model.device=cuda")
    assert "resuming from step 1 of 2" in messages
    assert "1 of 2 processes are new, and seeded" in messages


def test_two_gpus_give_what_one_gives(lora_on_gpu: dict[str, dict[str, Any]], tiny_llama: Path, tmp_path: Path):
    (write_inputs(tmp_path) / "recipe.yaml").write_text(recipe(tiny_llama, FAMILIES["lora"][1]))
    on_two_gpus(tmp_path, "run", "recipe.yaml", "--set", "model.device=cuda")
    for stage in STAGES:
        one = {name: value for name, value in lora_on_gpu[stage].items() if isinstance(value, (int, float))}
        two = metrics(tmp_path, stage)
        assert {name: two[name] for name in one} == pytest.approx(one, rel=5e-3, abs=1e-3), stage
