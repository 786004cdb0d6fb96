"""Several processes give what one gives: weights, losses and metrics, whatever the share of each."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import preloaded

WORKER = Path(__file__).with_name("ppo_worker.py")
ROOT = Path(__file__).resolve().parents[3]


def run(model, work, count, *, codes=None, **changes):
    """Start `count` processes; returns their exit codes and standard errors."""
    work.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    variables = os.environ | {"CI": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for rank in range(count):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        launched |= {"MASTER_PORT": port}
        named = {name: str(value) for name, value in launched.items()} if count > 1 else {}
        given = [model, work, json.dumps(changes), json.dumps(named)]
        started.append(preloaded.start(given, program=WORKER, cwd=ROOT, env=variables))
    ends = [process.communicate(timeout=200) for process in started]
    found = [process.returncode for process in started]
    if codes is None:
        assert found == [0] * count, "\n".join(error for _, error in ends)
    return found, [error for _, error in ends]


def metrics(work):
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"minibatches": 2, "prompts_per_step": 7, "micro_batch_size": 2, "eval_steps": 2, "kl_budget": 50.0},
            id="7 answers in 2 minibatches, evaluated",
        ),
        pytest.param(
            {"kind": "separate", "with_ptx": True, "ptx": {"coef": 0.5, "batch_size": 3}, "kl_in": "loss",
             "kl_estimator": "k2", "entropy_coef": 0.1, "critic_warmup_steps": 1, "reward_scale": "running"},
            id="all weights, ptx, losses",
        ),
    ],
)  # fmt: skip
def test_two_processes_agree_with_one(changes, tiny_llama, tmp_path):
    """Equal to float tolerance: the order of sums differs, and Adam divides by small second moments."""
    settings = {"steps": 3, "learning_rate": 1e-3, **changes}
    run(tiny_llama, tmp_path / "one", 1, **settings)
    run(tiny_llama, tmp_path / "two", 2, **settings)
    one, two = (load_file(tmp_path / name / "end-0.safetensors") for name in ("one", "two"))
    other = load_file(tmp_path / "two" / "end-1.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(
            two[name], tensor, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert torch.equal(other[name], two[name]), f"{name} differs between the processes"
    for mine, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name, value in mine.items():
            if isinstance(value, float):
                assert theirs[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name
            elif not isinstance(value, dict):
                assert theirs[name] == value, name


def test_a_run_goes_on_with_another_number_of_processes(tiny_llama, tmp_path):
    run(tiny_llama, tmp_path / "one", 1, learning_rate=1e-3)
    codes, _ = run(tiny_llama, tmp_path / "mixed", 2, codes=..., learning_rate=1e-3, stop_process_1_after=2)
    assert codes == [143, 143]
    run(tiny_llama, tmp_path / "mixed", 1, learning_rate=1e-3)
    one, mixed = (load_file(tmp_path / name / "end-0.safetensors") for name in ("one", "mixed"))
    for name, tensor in one.items():
        torch.testing.assert_close(mixed[name], tensor, atol=2e-5, rtol=1e-3)
