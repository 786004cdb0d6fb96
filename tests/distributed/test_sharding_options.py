"""What sharded models can be combined with: each case over several processes equals one process."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_cli.errors import UsageError
from rlhf_cli.models.sharding import compute_on
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.sft.settings import SFTSettings
from rlhf_cli.stages.sharding import (
    check_groups,
    check_processes,
    check_sharding,
    described_processes,
    require_processes,
    sharding_size,
)
from tests.conftest import byte_level_tokenizer
from tests.distributed.sharded_options import STEPS
from tests.distributed.test_sharding import environment
from tests.families.zoo import save_tiny
from tests.generation.server_stand_in import server_of
from tests.generation.vllm_stand_in import vllm
from tests.preloaded import start

__all__ = ["server_of", "vllm"]

SERVER = ("server-llama-lora", "server-llama-none")
COLOCATED = ("colocated-llama-lora", "colocated-llama-none", "parallel-llama-lora", "parallel-llama-none")
SAVE = ("save-llama-lora", "save-llama-none")
SAVES = ("saves-llama-lora", "saves-llama-none")
OTHERS = ("head-llama-lora", "head-llama-none", "offload-llama-lora", "offload-llama-none")
CASES = (*SERVER, *COLOCATED, *SAVE, *OTHERS)
HYBRID = ("hybrid-llama-lora", "hybrid-llama-none")
PARALLEL = "parallel-llama-lora"


def launch(script: str, arguments: list[object], processes: int, cwd: Path | None = None) -> None:
    """Run a script of this folder in several processes, as torchrun does on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_PORT": port, "LOCAL_WORLD_SIZE": processes, "RLHF_JOIN_SECONDS": 600}
    started = [
        start(
            arguments, program=Path(__file__).with_name(script), cwd=cwd,
            env=environment(processes, RANK=rank, LOCAL_RANK=rank, **shared),
        )
        for rank in range(processes)
    ]  # fmt: skip
    for process in started:
        stdout, stderr = process.communicate(timeout=900)
        assert process.returncode == 0, stdout + stderr


def run(folder: Path, cases: tuple[str, ...], processes: int) -> dict[str, dict]:
    """Run cases in several processes, which import the libraries once; returns what they wrote for each."""
    for family in sorted({case.split("-")[1] for case in cases}):
        save_tiny(family, byte_level_tokenizer(chat=True), folder / family)
    launch("sharded_options.py", [folder, *cases], processes)
    return {case: json.loads((folder / f"{case}.json").read_text()) for case in cases}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run(tmp_path_factory.mktemp("options"), (*CASES, *SAVES), 2)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run(tmp_path_factory.mktemp("hybrid"), (*HYBRID, PARALLEL), 4)


@pytest.mark.parametrize("case", CASES)
def test_the_weights_after_some_steps_are_those_of_one_process(case: str, found: dict[str, dict]):
    assert found[case]["difference"] < 1e-5
    assert found[case]["score"] < 1e-5
    assert found[case]["moved"] > 1e-4, "the comparison would pass if nothing was trained"


@pytest.mark.parametrize("case", SERVER)
def test_a_server_gets_the_weights_before_each_rollout_also_after_it_was_lost(case: str, found: dict[str, dict]):
    """At the start, for both evaluations and in each step; no process ever gathers the whole policy."""
    assert found[case]["lost"]
    assert found[case]["updates"] == STEPS + 3
    assert found[case]["same_seeds"]
    assert found[case]["is_shared"], "the reward model is an adapter on the sharded backbone"


@pytest.mark.parametrize("case", COLOCATED)
def test_an_engine_in_each_process_has_the_gathered_weights_before_each_rollout(case: str, found: dict[str, dict]):
    """Also after the run was interrupted, and if processes share an engine; none ever gathers the whole policy."""
    assert found[case]["off"] == 0.0
    assert found[case]["seeds"], "the seeds are those of one process, each once in each process of an engine"
    assert found[case]["both_draw"]
    before, after = found[case]["calls"]
    taken = ["wake weights", "load", "reset", "wake kv_cache", "sleep 2"]
    assert before == ["load", "reset", "sleep 2"] + taken * (1 + STEPS // 2), "for the start, an evaluation and steps"
    assert after == ["load", "reset", "sleep 2"] + taken * (STEPS // 2 + 1)
    assert found[case]["architectures"] == ["LlamaForCausalLM"], "vLLM finds its own class by this name"
    assert found[case]["drift"] < 1e-3, "importance weights are computed"


@pytest.mark.parametrize("case", COLOCATED)
def test_an_engine_that_fails_in_one_process_is_an_error_in_all(case: str, found: dict[str, dict]):
    own, other = found[case]["failed"]
    assert own == other
    assert "vllm failed while taking the policy's weights: RuntimeError: no memory for more" in own


@pytest.mark.parametrize("case", SAVES)
def test_checkpoints_of_shards_in_the_background_have_the_same_bytes(case: str, found: dict[str, dict]):
    assert found[case] == {"files": 3 * STEPS, "equal": True}


@pytest.mark.parametrize("case", SAVE)
def test_policies_of_save_steps_are_those_of_one_process(case: str, found: dict[str, dict]):
    assert found[case]["folders"] == [str(STEPS // 2)]
    assert found[case]["saved"] < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("offload")])
def test_offloaded_models_name_the_device_on_which_they_compute(case: str, found: dict[str, dict]):
    assert found[case]["offloaded"]
    assert found[case]["devices"] == ["cpu", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["server", "an engine each", "a shared engine"])
def test_the_command_with_vllm_writes_what_one_process_writes(
    kind: str, rlhf_here, vllm, server_of, tiny_llama: Path, tmp_path: Path, monkeypatch
):
    """With policies of some steps, a critic head, the group of a machine, and checkpoints in the background."""
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(8)))
    (tmp_path / "rate.py").write_text("def score(p, c):\n    return [float(text.count('e')) for text in c]\n")
    changes = {
        "ppo.steps": 4, "ppo.prompts_per_step": 3, "ppo.max_new_tokens": 6, "ppo.epochs": 1, "ppo.save_steps": 2,
        "ppo.critic": "head", "ppo.learning_rate": 1e-3, "ppo.schedule": "constant", "ppo.adapter": "none",
        "data.prompt_template": "null", "data.max_prompt_tokens": 32, "model.precision": "float32",
        "model.device": "cpu",
    }  # fmt: skip
    pairs = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    given = ["ppo", "--model", tiny_llama, "--prompts", "p.jsonl", "--function", "rate.py:score", *pairs]
    sharded = ["--set", "model.sharding=fsdp", "--set", "model.sharding_size=machine"]
    sharded += ["--set", "checkpoint_async=true", "--set", "ppo.checkpoint_steps=1"]
    has_server = kind == "server"
    sharded += ["--set", "generation.tensor_parallel_size=2"] if kind == "a shared engine" else []
    engine = tiny_llama if has_server else "-"
    launch("served_command.py", [engine, *given, *sharded, "--run-dir", "two"], 2, cwd=tmp_path)
    for module in ("server_obstacle", "vllm_generator"):
        monkeypatch.setattr(f"rlhf_cli.generation.{module}.obstacle", lambda policies: None)
    setting = f"generation.vllm_server={server_of(tiny_llama).url}" if has_server else "generation.engine=vllm"
    code, said = rlhf_here(*given, "--set", setting, "--run-dir", "one")
    assert code == 0, said
    for name in ("model.safetensors", "steps/2/model.safetensors", "critic/value_head.safetensors"):
        two, one = (load_file(tmp_path / run / "ppo" / name) for run in ("two", "one"))
        assert two.keys() == one.keys()
        assert max(float((two[key] - one[key]).abs().max()) for key in one) < 1e-5, name
    start = load_file(tiny_llama / "model.safetensors")
    moved = load_file(tmp_path / "two/ppo/model.safetensors")
    assert any(float((moved[key] - start[key]).abs().max()) > 1e-4 for key in start)


@pytest.mark.parametrize("case", HYBRID)
def test_two_groups_of_two_processes_train_as_one_process(case: str, of_four: dict[str, dict]):
    """Gradients are summed over both dimensions, and their norm counts each once; a checkpoint is whole."""
    found = of_four[case]
    assert found["difference"] < 1e-5
    assert found["score"] < 1e-5
    assert found["moved"] > 1e-4
    assert found["held"] == pytest.approx(0.5, abs=0.02), "a group of two has a copy"
    assert found["checkpoint"] < 1e-5
    assert found["saved"] < 1e-5
    norm, off = found["norms"]
    assert norm > 1e-3, "it was clipped"
    assert off < 1e-4


def test_two_engines_of_two_processes_draw_as_one_process(of_four: dict[str, dict]):
    """Fewer prompts than processes: an engine draws also what one of its processes alone wants, or nothing."""
    found = of_four[PARALLEL]
    assert found["difference"] < 1e-5
    assert found["score"] < 1e-5
    assert found["moved"] > 1e-4
    assert found["off"] == 0.0
    assert found["seeds"]


def test_offloaded_models_name_another_device_than_that_of_their_weights():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    compute_on(model, torch.device("meta"))
    assert model.device == model.model.device == torch.device("meta")
    assert model.lm_head.weight.device == torch.device("cpu")
    assert isinstance(model, LlamaForCausalLM)


def recipe(**model: object) -> Recipe:
    return Recipe.model_validate(
        {"model": {"path": "base", "sharding": "fsdp"} | model, "ppo": {"save_steps": 3, "critic": "head"}}
    )


def test_a_server_save_steps_and_a_critic_head_are_supported():
    served = recipe().model_copy(update={"generation": Recipe.model_validate(
        {"model": {"path": "base"}, "generation": {"engine": "vllm", "vllm_server": "http://localhost:8000"}}
    ).generation})  # fmt: skip
    check_sharding(served, {"ppo"})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"sharding": "none", "sharding_size": 2}, "`sharding_size` has no effect without `sharding: fsdp`"),
        ({"sharding": "none", "sharding_cpu_offload": True}, "`sharding_cpu_offload` has no effect without"),
        ({"sharding_cpu_offload": True, "device": "cpu"}, "`sharding_cpu_offload` has no effect with `device: cpu`"),
        ({"sharding_size": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_without_effect_are_refused_in_the_recipe(model: dict, message: str):
    with pytest.raises(ValueError, match=message):
        recipe(**model)


@pytest.mark.parametrize(
    ("size", "count", "of_machine", "message"),
    [
        (3, 8, 4, "makes groups of 3 processes, and 8 processes cannot be divided"),
        (16, 8, 4, "makes groups of 16 processes"),
        ("machine", 8, 3, "`model.sharding_size: machine` makes groups of 3 processes"),
        ("machine", 2, 1, "divides a model among the processes of a machine, and each has one"),
    ],
)
def test_groups_that_do_not_fit_are_refused(size: object, count: int, of_machine: int, message: str):
    with pytest.raises(UsageError, match=message):
        check_groups(recipe(sharding_size=size).model, count, of_machine)
    check_groups(recipe(sharding_size=2).model, 8, 4)


@pytest.mark.parametrize(
    ("of_machine", "message"),
    [("1", "and each has one"), ("", "needs a launcher that sets LOCAL_WORLD_SIZE"), ("3", "groups of 3 processes")],
)
def test_the_processes_of_a_machine_are_checked_before_they_meet(of_machine: str, message: str, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", of_machine)
    with pytest.raises(UsageError, match=message):
        check_processes(recipe(sharding_size="machine").model_copy(update={"sft": SFTSettings(data="d")}), {"sft"})


@pytest.mark.parametrize(
    ("model", "count", "text"),
    [
        ({}, 1, None),
        ({"sharding": "none"}, 2, "2 processes share the work, each with whole models"),
        ({}, 4, "4 processes share the work; they also divide the models (`model.sharding: fsdp`)"),
        (
            {"sharding_size": 2},
            4,
            "4 processes share the work; they also divide the models, in groups of 2 (`model.sharding: fsdp`)",
        ),
    ],
)
def test_a_run_says_how_processes_share_it(model: dict, count: int, text: str | None):
    assert described_processes(recipe(**model).model, count) == text


def test_the_group_of_a_machine_are_the_processes_that_the_launcher_counts(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert sharding_size(recipe(sharding_size="machine").model) == 4
    assert sharding_size(recipe(sharding_size=2).model) == 2
    assert sharding_size(recipe().model) is None


def test_offloading_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"`model\.sharding_cpu_offload` has no effect on the device `cpu`") as caught:
        require_processes(recipe(sharding_cpu_offload=True))
    with pytest.raises(UsageError, match="has no effect on the device"):
        check_processes(recipe(sharding_cpu_offload=True), {"ppo"})
    check_processes(recipe(sharding_cpu_offload=True), {"label"})
    assert "model.sharding_cpu_offload=false" in (caught.value.hint or "")
