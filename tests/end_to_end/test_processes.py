"""`--processes 2` through the real command, every stage of a run, against one process; and its ends before the end.

Also with models divided among the two (`model.sharding: fsdp`); the reward model of `ppo` is an adapter on its policy.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STAGES = ("sft", "label", "train-rm", "ppo", "evaluate")
GOLD = """
def score(prompts, completions):
    return [completion.count("e") - abs(len(completion) - 12) / 8 for completion in completions]
"""
# Odd numbers on purpose: shares are uneven, and the last step of `sft` and of `train-rm` leaves one process without.
RECIPE = """
name: two
seed: 3
model: {{path: {model}, precision: float32}}
data: {{prompts: prompts.jsonl, holdout: 0.35}}
sft: {{data: demonstrations.jsonl, epochs: 2, batch_size: 5, micro_batch_size: 2, learning_rate: 5.0e-3,
      checkpoint_steps: 2, lora: {{rank: 4}}}}
label: {{by: function, function: gold.py:score, completions_per_prompt: 3,
        sampling: {{max_new_tokens: 8, batch_size: 6}}}}
train_rm: {{epochs: 1, batch_size: 5, micro_batch_size: 2, learning_rate: 1.0e-3, checkpoint_steps: 2,
           eval_steps: 1, center_coef: 0.01, batch_sum_coef: 0.01, lora: {{rank: 4}}}}
ppo: {{steps: 4, prompts_per_step: 5, micro_batch_size: 2, max_new_tokens: 8, epochs: 2, learning_rate: 1.0e-3,
      checkpoint_steps: 1, lora: {{rank: 4}}}}
evaluate: {{judge_function: gold.py:score, sampling: {{max_new_tokens: 8, batch_size: 2}}}}
"""
WORDS = ("the", "cat", "sat", "on", "a", "warm", "stone", "and", "watched", "how", "bread", "is", "baked", "near", "it")


def write_inputs(folder: Path, model: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [f"{WORDS[n % 15]} {WORDS[n * 7 % 13]} {n}" for n in range(13)]
    demonstrations = [{"prompt": prompt, "completion": f" {WORDS[len(prompt) % 15]}" * 2} for prompt in prompts]
    for name, rows in (("prompts", [{"prompt": prompt} for prompt in prompts]), ("demonstrations", demonstrations)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "gold.py").write_text(GOLD)
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model))
    return folder


def environment(**more: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return plain | {"CI": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


@dataclass
class Ended:
    code: int
    stdout: str
    stderr: str
    folder: Path

    @property
    def artifacts(self) -> Path:
        return self.folder / "runs" / "two"

    def metrics(self, stage: str) -> dict[str, float]:
        return json.loads((self.artifacts / stage / "manifest.json").read_text())["metrics"]


def start(folder: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("rlhf")), *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(folder: Path, *arguments: str, **more: str) -> Ended:
    process = start(folder, *arguments, **more)
    stdout, stderr = process.communicate(timeout=240)
    return Ended(process.returncode, stdout, stderr, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Ended:
    folder = write_inputs(tmp_path_factory.mktemp("alone"), tiny_llama)
    return run(folder, "run", "recipe.yaml", "--json", "--processes", "1")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Ended:
    folder = write_inputs(tmp_path_factory.mktemp("together"), tiny_llama)
    return run(folder, "run", "recipe.yaml", "--json", "--processes", "2")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Ended:
    folder = write_inputs(tmp_path_factory.mktemp("sharded"), tiny_llama)
    return run(folder, "run", "recipe.yaml", "--json", "--processes", "2", "--set", "model.sharding=fsdp")


@pytest.fixture(params=["whole models", "sharded models"])
def two(request: pytest.FixtureRequest) -> Ended:
    """Two processes, with whole or with divided models."""
    return request.getfixturevalue("together" if request.param == "whole models" else "sharded")


def test_with_sharded_models_too_all_stages_finish(sharded: Ended):
    assert sharded.code == 0, sharded.stderr
    assert [row["status"] for row in json.loads(sharded.stdout)["stages"]] == ["done"] * 5
    assert "the reward model is an adapter on it too" in sharded.stderr


def test_both_finish_and_only_rank_0_speaks(alone: Ended, together: Ended):
    assert alone.code == 0, alone.stderr
    assert together.code == 0, together.stderr
    assert [row["status"] for row in json.loads(together.stdout)["stages"]] == ["done"] * 5, "one JSON object"
    for line in ("sft: starting (it has not run yet)", "reward model: done", "results are in runs/two"):
        assert together.stderr.count(line) <= 1, together.stderr
    assert together.stderr.count("fine-tuning: done") == 1


def test_the_recorded_command_has_the_number_of_processes(alone: Ended, two: Ended):
    assert "share the work" not in alone.stderr
    recorded = (two.artifacts / "command.txt").read_text().splitlines()[-1]
    again = subprocess.run(
        ["/bin/sh", "-c", recorded.partition("  ")[2] + " --dry-run"],
        env=environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert again.returncode == 0, again.stderr
    assert [row["status"] for row in json.loads(again.stdout)["stages"]] == ["cached"] * 5
    log = (two.artifacts / "log.txt").read_text()
    for told in (recorded, log.partition("\n")[0]):
        assert " --processes 2" in told, told
    for text in (two.stderr, log):
        assert text.count("2 processes share the work") == 1


def test_what_sharding_needs_is_checked_before_a_stage_is_announced(together: Ended, tmp_path: Path):
    shutil.copytree(together.folder, tmp_path, dirs_exist_ok=True)
    sharded = ("ppo", "recipe.yaml", "--force", "--set", "model.sharding=fsdp")
    alone = run(tmp_path, *sharded)
    offloaded = run(
        tmp_path, *sharded, "--set", "model.sharding_cpu_offload=true", "--processes", "2", CUDA_VISIBLE_DEVICES=""
    )
    for ended, message in ((alone, "but there is only one"), (offloaded, "has no effect on the device `cpu`")):
        assert ended.code == 2
        assert message in ended.stderr
        assert "starting" not in ended.stderr
        assert "replaced" not in ended.stderr


def test_counts_of_progress_are_those_of_all_processes(alone: Ended, two: Ended):
    def counts(run: Ended) -> list[str]:
        units = "records|completions|questions|steps"
        return sorted(set(re.findall(rf"^.*: [0-9,]+ (?:{units})$", run.stderr, flags=re.MULTILINE)))

    assert len(counts(alone)) > 8
    assert counts(two) == counts(alone)


@pytest.mark.parametrize("stage", ["sft", "train-rm", "ppo"])
def test_two_processes_end_with_the_weights_of_one(stage: str, alone: Ended, two: Ended):
    found = sorted(path.relative_to(alone.artifacts) for path in (alone.artifacts / stage).rglob("*.safetensors"))
    assert found
    for name in found:
        one, other = load_file(alone.artifacts / name), load_file(two.artifacts / name)
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(other[key], one[key], atol=2e-4, rtol=2e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("stage", ["sft", "train-rm", "ppo"])
def test_the_losses_of_every_step_are_those_of_one_process(stage: str, alone: Ended, two: Ended):
    def curve(run: Ended) -> list[dict]:
        return [json.loads(line) for line in (run.artifacts / stage / "metrics.jsonl").read_text().splitlines()]

    one, other = curve(alone), curve(two)
    assert len(one) == len(other) > 1
    for before, after in zip(one, other, strict=True):
        figures = {name: value for name, value in before.items() if isinstance(value, float) and "time" not in name}
        figures = {name: value for name, value in figures.items() if "second" not in name}
        assert {name: after[name] for name in figures} == pytest.approx(figures, rel=5e-3, abs=2e-4)


def test_the_same_answers_are_labeled_and_evaluated(alone: Ended, together: Ended):
    assert (alone.artifacts / "label" / "rankings.jsonl").read_text() == (
        together.artifacts / "label" / "rankings.jsonl"
    ).read_text()
    one, two = ((run.artifacts / "evaluate" / "samples.jsonl").read_text().splitlines() for run in (alone, together))
    for before, after in zip(map(json.loads, one), map(json.loads, two), strict=True):
        for name in ("baseline", "policy", "gold_policy"):
            assert before[name] == after[name]
        assert after["kl_nats"] == pytest.approx(before["kl_nats"], abs=2e-3)
        assert after["reward_policy"] == pytest.approx(before["reward_policy"], abs=2e-2)


def test_held_out_figures_agree(alone: Ended, two: Ended):
    for stage, names in (
        ("sft", ("eval_loss_before", "eval_loss")),
        ("train-rm", ("rm/accuracy", "rm/mean", "rm/std")),
    ):
        for name in names:
            assert two.metrics(stage)[name] == pytest.approx(alone.metrics(stage)[name], rel=1e-3, abs=1e-3), name


def rank_1_of(supervisor: int) -> int:
    """The process id of rank 1."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    return next(int(pid) for pid in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())


def when_saved(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "runs" / "two" / ".ppo.work" / f"step-{step:08d}").is_dir():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {step} was never saved"
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in Linux's /proc")
def test_stopped_and_killed_it_ends_with_the_bytes_of_an_uninterrupted_run(together: Ended, tmp_path: Path):
    """SIGTERM in one step, kill -9 of one rank in another: what two processes resume is what two would have made."""
    shutil.copytree(together.folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs" / "two" / "ppo")
    ppo = ("ppo", "recipe.yaml", "--processes", "2")

    stopped = start(tmp_path, *ppo)
    when_saved(stopped, tmp_path, 1)
    stopped.terminate()
    _, stderr = stopped.communicate(timeout=60)
    assert stopped.returncode == 143, stderr
    assert stderr.count("error: stopped by SIGTERM; finished steps and batches are saved") == 1
    saved = sorted((tmp_path / "runs" / "two" / ".ppo.work").glob("step-*"))

    killed = start(tmp_path, *ppo)
    when_saved(killed, tmp_path, int(saved[-1].name[-8:]) + 1)
    os.kill(rank_1_of(killed.pid), signal.SIGKILL)
    began = time.monotonic()
    _, stderr = killed.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert killed.returncode == 137, stderr
    assert "error: rank 1 of 2 was killed by SIGKILL" in stderr
    assert "Traceback" not in stderr

    last = run(tmp_path, *ppo)
    assert last.code == 0, last.stderr
    files = sorted(path.relative_to(together.artifacts) for path in (together.artifacts / "ppo").rglob("*.safetensors"))
    assert len(files) > 1
    for name in files:
        assert (last.artifacts / name).read_bytes() == (together.artifacts / name).read_bytes(), name


def test_a_signal_to_one_process_of_another_launcher_ends_all_with_its_exit_code(together: Ended, tmp_path: Path):
    """As under torchrun: no supervisor, and no process may abort (-6) because its peer ended first."""
    shutil.copytree(together.folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs" / "two" / "ppo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(tmp_path, "ppo", "recipe.yaml", **shared, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    when_saved(ranks[0], tmp_path, 1)
    ranks[1].terminate()
    errors = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [143, 143], errors


def test_more_processes_than_prompts(alone: Ended, tmp_path: Path):
    """Two prompts a step and three processes: one of them has nothing to sample, and all end with one's weights."""
    weights = []
    for count in (1, 3):
        folder = tmp_path / str(count)
        shutil.copytree(alone.folder, folder)
        changes = [part for value in ("prompts_per_step=2", "steps=1") for part in ("--set", f"ppo.{value}")]
        ended = run(folder, "ppo", "recipe.yaml", *changes, "--processes", str(count))
        assert ended.code == 0, ended.stderr
        weights.append(load_file(ended.artifacts / "ppo" / "model.safetensors"))
    one, three = weights
    for key in one:
        torch.testing.assert_close(three[key], one[key], atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--nproc-per-node", "1", "-m"),
        ("accelerate.commands.launch", "--num_processes", "1", "-m"),
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_the_documented_launchers_train_with_one_process(launcher: tuple[str, ...], tmp_path: Path, tiny_llama: Path):
    write_inputs(tmp_path, tiny_llama)
    command = [sys.executable, "-m", *launcher, "rlhf_cli", "sft", "recipe.yaml", "--set", "model.device=cpu"]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(ACCELERATE_USE_CPU="1"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("runs/two/sft\n")
    assert (tmp_path / "runs" / "two" / "sft" / "model.safetensors").is_file()
