"""`train.sh` of `rlhf export`, run with a stub in the place of the engine: what the engine is told.

The rules are those of verl 0.9.1 and OpenRLHF 0.11.2, as `rlhf_cli.export.batch_sizes` describes them.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.export.engine_run import EngineRun, read_run
from rlhf_cli.export.openrlhf import options as openrlhf_options
from rlhf_cli.export.openrlhf import write_openrlhf
from rlhf_cli.export.verl import options as verl_options
from rlhf_cli.export.verl import write_verl
from rlhf_cli.settings.shared import GenerationSettings

WRITE: dict[str, Callable[[EngineRun, Path], str]] = {"verl": write_verl, "openrlhf": write_openrlhf}
SHAPES = [(64, 1, 2, 64), (8, 1, 2, 8), (8, 2, 4, 8), (12, 1, 5, 8), (6, 4, 24, 3)]
"""Prompts per step, completions per prompt, minibatches, micro-batch."""


@pytest.fixture
def run_of(made_run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineRun]:
    """Return a function that reads the run with other settings; its models are not written."""
    monkeypatch.setattr(EngineRun, "write_models", lambda self, folder: "models")
    monkeypatch.setattr(EngineRun, "critic", lambda self, folder: "policy")
    run = read_run(made_run)

    def changed(generation: dict[str, Any] | None = None, **ppo: Any) -> EngineRun:
        update = {"ppo": run.ppo.model_copy(update=ppo), "generation": GenerationSettings(**(generation or {}))}
        return replace(run, recipe=run.recipe.model_copy(update=update))

    return changed


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., tuple[int, dict[str, str], str]]:
    """Return a function that runs a script, and returns its status, the engine's options and the messages."""
    stub = tmp_path / "bin" / "python3"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$TOLD"\n')
    stub.chmod(0o755)

    def start(folder: Path, gpus: int | None, nodes: int = 1) -> tuple[int, dict[str, str], str]:
        words = tmp_path / "told"
        words.unlink(missing_ok=True)
        environment = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "TOLD": str(words), "NODES": str(nodes)}
        environment |= {} if gpus is None else {"GPUS": str(gpus)}
        script = ["bash", str(folder / "train.sh")]
        done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
        given = words.read_text().splitlines() if words.is_file() else []
        pairs = [word.split("=", 1) for word in given if "=" in word]
        pairs += [(name, value) for name, value in itertools.pairwise(given) if name.startswith("--")]
        return done.returncode, dict(pairs), done.stderr

    return start


def written(engine: str, run: EngineRun, folder: Path) -> str:
    for name in ("policy", "reward-model"):
        (folder / name).mkdir(parents=True)
    return WRITE[engine](run, folder)


def check_verl(given: dict[str, str], shape: tuple[int, int, int, int], total: int, engine_gpus: int) -> None:
    prompts, samples, minibatches, micro_batch = shape
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    assert int(given["data.train_batch_size"]) == prompts
    assert int(given[f"{rollout}.n"]) == samples
    mini, micro = int(given[f"{actor}.ppo_mini_batch_size"]), int(given[f"{actor}.ppo_micro_batch_size_per_gpu"])
    assert prompts % mini == 0
    assert mini * samples % total == 0
    assert mini * samples // total % micro == 0
    assert mini >= max(1, prompts // minibatches)
    assert 1 <= micro <= micro_batch
    for name in (f"{rollout}.log_prob", "actor_rollout_ref.ref.log_prob", "critic.ppo"):
        assert int(given[f"{name}_micro_batch_size_per_gpu"]) == micro
    assert int(given["trainer.n_gpus_per_node"]) * int(given["trainer.nnodes"]) == total
    assert int(given[f"{rollout}.tensor_model_parallel_size"]) == engine_gpus


def check_openrlhf(given: dict[str, str], shape: tuple[int, int, int, int], total: int, engine_gpus: int) -> None:
    prompts, samples, minibatches, micro_batch = shape
    assert int(given["--rollout.batch_size"]) * int(given["--rollout.n_samples_per_prompt"]) == prompts * samples
    batch, micro = int(given["--train.batch_size"]), int(given["--train.micro_batch_size"])
    assert prompts * samples % batch == 0
    assert batch % (micro * total) == 0
    assert batch >= prompts * samples // minibatches
    assert 1 <= micro <= micro_batch
    assert int(given["--rollout.micro_batch_size"]) == micro
    for role in ("actor", "ref", "critic", "reward"):
        assert int(given[f"--{role}.num_nodes"]) * int(given[f"--{role}.num_gpus_per_node"]) == total
    assert int(given["--vllm.tensor_parallel_size"]) == engine_gpus
    assert int(given["--vllm.num_engines"]) * engine_gpus == total


CHECK = {"verl": check_verl, "openrlhf": check_openrlhf}


@pytest.mark.slow
@pytest.mark.parametrize("engine", WRITE)
@pytest.mark.parametrize("engine_gpus", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_engine_is_told_sizes_that_it_accepts(engine, engine_gpus, shape, run_of, told, tmp_path):
    prompts, samples, minibatches, micro_batch = shape
    run = run_of(
        {"engine": "vllm", "tensor_parallel_size": engine_gpus},
        prompts_per_step=prompts,
        samples_per_prompt=samples,
        minibatches=minibatches,
        micro_batch_size=micro_batch,
    )
    written(engine, run, tmp_path / "out")
    for gpus, nodes in [(1, 1), (2, 1), (3, 1), (8, 1), (2, 2), (None, 1)]:
        status, given, messages = told(tmp_path / "out", gpus, nodes)
        if gpus is not None and (prompts * samples % (gpus * nodes) or gpus % engine_gpus):
            assert (status, given) == (2, {})
            assert messages.startswith("train.sh: ")
            continue
        assert status == 0, messages
        name = "trainer.n_gpus_per_node" if engine == "verl" else "--actor.num_gpus_per_node"
        assert gpus is None or int(given[name]) == gpus
        CHECK[engine](given, shape, int(given[name]) * nodes, engine_gpus)


@pytest.mark.slow
@pytest.mark.parametrize("engine", WRITE)
def test_gpus_that_make_up_no_whole_engines_are_refused(engine, run_of, told, tmp_path):
    said = written(
        engine,
        run_of({"engine": "vllm", "tensor_parallel_size": 4}, prompts_per_step=3, samples_per_prompt=1, minibatches=1),
        tmp_path / "out",
    )
    assert "3 completions per step cannot be divided among engines of 4 GPUs" in said
    status, _, messages = told(tmp_path / "out", 3)
    assert (status, messages) == (2, "train.sh: a vLLM engine has 4 GPUs of a node, which must divide GPUS=3\n")


@pytest.mark.slow
@pytest.mark.parametrize("engine", WRITE)
def test_settings_of_the_generation_are_carried_or_listed(engine, run_of, told, tmp_path):
    name = "actor_rollout_ref.rollout.gpu_memory_utilization" if engine == "verl" else "--vllm.gpu_memory_utilization"
    written(engine, run_of({"gpu_memory_utilization": 0.7}), tmp_path / "share")
    assert told(tmp_path / "share", 1)[1][name] == "0.7"
    written(engine, run_of({"vllm_server": "http://host:1"}), tmp_path / "server")
    assert '#   generation.vllm_server: "http://host:1"' in (tmp_path / "server" / "train.sh").read_text()
    assert "vllm_server" not in (tmp_path / "share" / "train.sh").read_text()


@pytest.mark.parametrize(
    ("context", "reward_context", "max_new_tokens", "prompt", "completion", "reader"),
    [
        (10**9, 10**9, 16, 512, 16, ""),
        (96, 10**9, 16, 80, 16, "policy reads 96"),
        (2048, 96, 16, 80, 16, "reward model reads 96"),
        (96, 10**9, 95, 1, 95, "policy reads 96"),
        (96, 10**9, 96, 48, 48, "policy reads 96"),
        (4096, 2048, 5000, 512, 1536, "reward model reads 2048"),
    ],
)
def test_prompt_and_completion_fit_what_policy_and_reward_model_read(
    context, reward_context, max_new_tokens, prompt, completion, reader, run_of
):
    run = run_of()
    sampling = replace(run.sampling, max_new_tokens=max_new_tokens)
    run = replace(run, context=context, reward_context=reward_context, sampling=sampling)
    given, words = verl_options(run, "policy"), openrlhf_options(run, "policy")
    assert (given["data.max_prompt_length"], given["data.max_response_length"]) == (prompt, completion)
    assert (words["data.max_len"], words["rollout.max_new_tokens"]) == (prompt + completion, completion)
    said = run.lengths_report()
    assert reader in said
    assert ("prompts have at most" in said) is (prompt != 512)
    assert ("completions have at most" in said) is (completion != max_new_tokens)


def test_the_context_of_a_reward_model_is_that_of_the_model_that_it_is_an_adapter_on(made_run):
    run = read_run(made_run)
    assert run.reward_context == run.context < 10**9
