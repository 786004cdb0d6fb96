"""`rlhf plan --gpu`: memory and time on machines that are not at hand."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_cli.cli.app import app
from rlhf_cli.cli.plan_report import plan_json, show_plan
from rlhf_cli.errors import UsageError
from rlhf_cli.models.gpus import Cluster
from rlhf_cli.models.model_sizes import SIZES
from rlhf_cli.pipeline.plan import plan_run
from rlhf_cli.pipeline.plan_target import Target
from rlhf_cli.pipeline.prediction import COMPUTE
from rlhf_cli.pipeline.run_plan import RunPlan
from rlhf_cli.pipeline.selection import Selection
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.stages.sharding import check_sharding


@pytest.fixture
def small(tiny_llama: Path, tmp_path: Path) -> Path:
    """A recipe of three stages on a tiny model, with settings of another machine."""
    rows = [{"prompt": f"Why {number}?", "chosen": " Because.", "rejected": " No."} for number in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        f"name: small\nmodel: {{path: {tiny_llama}, device: cuda, attention: triton}}\n"
        "generation: {engine: vllm, gpu_memory_utilization: 0.6}\n"
        "data: {prompts: prompts.jsonl, holdout: 0.2}\nsampling: {max_new_tokens: 8}\n"
        "train_rm: {data: pairs.jsonl, batch_size: 4, normalize: false}\n"
        "ppo: {steps: 3, prompts_per_step: 16, epochs: 1, micro_batch_size: 2}\n"
    )
    return recipe


def planned(
    recipe: Path, *arguments: str, size: str | None = None, count: int = 1, gpu: str = "h100", servers: int = 0
) -> RunPlan:
    target = Target(Cluster.of(gpu, count), None if size is None else SIZES[size], servers)
    return plan_run(load_recipe(recipe, list(arguments)), recipe.parent / "run", Selection(), target=target)


def test_the_command_plans_for_gpus_that_this_machine_lacks(small: Path, monkeypatch):
    monkeypatch.chdir(small.parent)
    options = ["--gpu", "h100", "--gpus", "16", "--size", "8b"]
    done = CliRunner().invoke(app, ["plan", str(small), *options])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "bfloat16 instructions" not in said, "nothing is said of this machine"
    assert "machines: 16 x H100 on 2 nodes, 400 Gbit/s per GPU between; predictions from data sheets" in said
    assert "step predicted about" in said
    assert "(memory bandwidth)" in said
    assert "a GPU has 80.0 GB" in said
    assert "time: predicted about" in said
    assert "not fit" not in said
    assert not (small.parent / "runs").exists()


def test_a_run_of_which_a_stage_does_not_fit_has_no_time(small: Path, capsys):
    """Those that fit keep their times; the last lines name the others, with the phases that are too large."""
    found = planned(small, "generation={engine: torch}", "ppo.adapter=none", "ppo.critic_from=policy", size="8b")
    assert [stage.name for stage in found.too_large] == ["ppo"]
    rewards, ppo = found.stages
    assert found.seconds is ppo.seconds is ppo.predicted is None
    assert rewards.seconds
    plain = plan_json(found)
    assert plain["seconds"] is plain["stages"][1]["seconds"] is None
    assert [stage["fits"] for stage in plain["stages"]] == [True, False]
    show_plan(found)
    said = capsys.readouterr().out
    assert said.strip().splitlines()[-2:] == [
        "does not fit: `ppo`, in `load`, `rollout`, `passes`, `update`",
        "time: no total, because not all stages fit",
    ]
    assert said.count("predicted about") == 1, "of train-rm"


def test_a_total_says_of_which_stages_it_lacks_the_time(small: Path, capsys):
    served = ("generation={vllm_server: http://localhost:8000}", "model.sharding=fsdp")
    found = planned(small, *served, size="1b", count=8)
    assert [stage.seconds is None for stage in found.stages] == [False, True], "the GPUs of the server are not known"
    show_plan(found)
    assert capsys.readouterr().out.strip().endswith("; without `ppo`")


def test_json_has_the_seconds_of_each_phase(small: Path):
    found = plan_json(planned(small, gpu="a100"))
    assert found["machines"] == "1 x A100"
    (ppo,) = [stage for stage in found["stages"] if stage["name"] == "ppo"]
    assert ppo["precision"] == "bfloat16"
    assert ppo["predicted"].keys() == {"rollout", "passes", "scoring", "update"}
    assert ppo["seconds"] == pytest.approx(sum(one["seconds"] for one in ppo["predicted"].values()))
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))


def test_a_size_takes_the_place_of_the_model(small: Path):
    stages = {stage.name: stage for stage in planned(small, "ppo.adapter=none", size="8b").stages}
    shape = SIZES["8b"]
    for name in ("train-rm", "ppo"):
        memory = stages[name].memory
        assert memory is not None
        assert "process" not in memory.phases["update"], "on a GPU"
    ppo = stages["ppo"]
    assert ppo.memory is not None
    assert ppo.memory.phases["update"]["optimizer"] == 2 * 8 * shape.weights, "of policy and critic"
    assert ppo.memory.phases["rollout"]["vLLM"] == int(0.6 * 80e9)
    rewards = stages["train-rm"]
    assert rewards.predicted is not None
    assert rewards.workload is not None
    trained = sum(work.flops for work in rewards.workload.work if work.phase == "update")
    assert trained > 4 * shape.backbone * rewards.workload.tokens("train"), "under an adapter"
    assert rewards.predicted["update"].compute == pytest.approx(trained / (989e12 * COMPUTE))


def test_more_gpus_divide_the_work(small: Path):
    one, four = (planned(small, size="1b", count=count).stages[1].predicted for count in (1, 4))
    assert one is not None
    assert four is not None
    assert four["passes"].compute == pytest.approx(one["passes"].compute / 4)
    assert one["update"].network == 0 < four["update"].network


def test_sharded_models_are_planned_where_there_is_one_process(small: Path):
    changes = ("model.sharding=fsdp", "generation={engine: torch}", "ppo.adapter=none", "ppo.critic_from=policy")
    whole = planned(small, *changes[1:], size="8b").stages[1].memory
    sharded = planned(small, *changes, size="8b", count=8).stages[1].memory
    assert whole is not None
    assert sharded is not None
    assert sharded.phases["update"]["optimizer"] == whole.phases["update"]["optimizer"] // 8
    assert sharded.phases["rollout"]["gathered"] == 2 * SIZES["8b"].weights


def test_a_vllm_server_with_gpus_of_its_own_is_planned(small: Path, capsys):
    served = ("generation={vllm_server: http://localhost:8000}", "model.sharding=fsdp")
    found = planned(small, *served, size="70b", count=8, servers=8)
    (ppo,) = [stage for stage in found.stages if stage.name == "ppo"]
    assert ppo.memory is not None
    assert ppo.memory.phases["rollout"]["sent"] == 2**29
    assert ppo.predicted is not None
    assert ppo.predicted["rollout"].network > 4 * SIZES["70b"].backbone / 50e9, "weights are sent in each step"
    show_plan(found)
    said = " ".join(capsys.readouterr().out.split())
    assert "vLLM server: 4 x 2 GPUs" in said
    assert "70.6 GB of weights" in said
    unknown = planned(small, *served, size="70b", count=8)
    assert [stage.predicted for stage in unknown.stages if stage.name == "ppo"] == [None]
    small_server = planned(small, *served, size="70b", count=8, servers=1)
    show_plan(small_server)
    assert "too large for a vLLM server on 1 x H100" in " ".join(capsys.readouterr().out.split())


def test_an_engine_of_several_gpus_is_planned(small: Path, capsys):
    changes = ("model.sharding=fsdp", "generation.gpu_memory_utilization=0.5")
    for size, held in ((1, 141.6), (4, 40.0)):
        found = planned(small, *changes, f"generation.tensor_parallel_size={size}", size="70b", count=8)
        (ppo,) = [stage for stage in found.stages if stage.name == "ppo"]
        assert ppo.memory is not None
        assert ppo.memory.phases["rollout"]["vLLM"] / 1e9 == pytest.approx(held, rel=0.02)
        show_plan(found)
        said = " ".join(capsys.readouterr().out.split())
        expected = "vLLM holds a whole model on each GPU, and this one is too large for that"
        assert (expected in said) is (size == 1)
    show_plan(planned(small, *changes, "generation.tensor_parallel_size=2", size="70b", count=8))
    assert "vLLM does not start with a share below `generation.gpu_memory_utilization=0.8" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("last", "changes", "is_refused"),
    [("ppo", (), True), ("train-rm", (), False), ("train-rm", ("train_rm.normalize=true",), True)],
)
def test_shared_engines_concern_stages_that_draw(last: str, changes: tuple[str, ...], is_refused: bool, small: Path):
    loaded = load_recipe(small, [*changes, "generation.tensor_parallel_size=2"])
    target = Target(Cluster.of("h100", 3), None, 0)
    refused = pytest.raises(UsageError, match="there are 3 processes on each machine") if is_refused else nullcontext()
    with refused:
        plan_run(loaded, small.parent / "run", Selection(last=last), target=target)


def test_memory_alone_is_planned_for_a_gpu_that_is_not_listed(small: Path, capsys):
    found = planned(small, "ppo.adapter=none", size="8b", gpu="24")
    assert found.seconds is None
    assert all(stage.predicted is None for stage in found.stages)
    assert "ppo.adapter=lora" in [one.change for one in found.stages[1].advice]
    show_plan(found)
    said = " ".join(capsys.readouterr().out.split())
    assert "does not fit 24.0 GB" in said
    show_plan(planned(small, gpu="24"))
    assert "time: the speed of this GPU is not known" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_each_change_that_is_printed_is_one_that_the_recipe_accepts(sharding, adapter, small: Path):
    (small.parent / "sft.jsonl").write_text('{"prompt": "Why?", "completion": " Because."}\n' * 24)
    given = [f"model.sharding={sharding}", "generation={engine: torch}", f"ppo.adapter={adapter}", "sft.data=sft.jsonl"]
    given += [f"sft.adapter={adapter}", f"train_rm.adapter={adapter}"]
    found = planned(small, *given, size="70b", count=8)
    changes = {one.change for stage in found.stages for one in stage.advice}
    assert changes
    assert ("ppo.optimizer=adamw-8bit" in changes) is (sharding == "none"), "what is possible is still named"
    for change in changes:
        check_sharding(load_recipe(small, [*given, change]).recipe, {stage.name for stage in found.stages})


def test_sharding_is_proposed_with_the_processes_that_it_needs(small: Path, capsys):
    (alone,) = [stage for stage in planned(small, size="70b").stages if stage.name == "ppo"]
    assert "model.sharding=fsdp" not in [one.change for one in alone.advice]
    show_plan(planned(small, size="70b", count=16))
    said = " ".join(capsys.readouterr().out.split())
    assert "--set model.sharding=fsdp saves" in said
    assert "; start 8 processes on each machine (`--processes`)" in said


def test_a_policy_that_is_too_large_to_be_drawn_from_has_remedies_that_can_be_pasted(small: Path, capsys):
    given = ("model.sharding=fsdp", "generation={engine: torch}")
    found = planned(small, *given, "evaluate={}", size="70b", count=8)
    show_plan(found)
    said = " ".join(capsys.readouterr().out.split())
    served = "generation={vllm_server: http://HOST:8000}"
    assert f"--set '{served}' saves" in said
    assert "fits; needs a vLLM server on 2 more such GPUs (`--server-gpus 2` plans it)" in said
    assert "none suffices" not in said, "evaluate draws as PPO does"
    (pasted,) = [
        one for one in planned(small, *given, served, size="70b", count=8, servers=2).stages if one.name == "ppo"
    ]
    assert pasted.fits
    assert pasted.predicted is not None
    (plain,) = [stage for stage in plan_json(found)["stages"] if stage["name"] == "ppo"]
    assert [one["server_gpus"] for one in plain["advice"] if one["set"] == served] == [2]


def test_changes_that_suffice_together_are_named(small: Path, capsys):
    given = ("generation={engine: torch}", "ppo.adapter=none", "ppo.critic_from=policy")
    found = planned(small, *given, size="70b", count=8)
    show_plan(found)
    said = " ".join(capsys.readouterr().out.split())
    ppo = found.stages[1]
    assert [one.fits for one in ppo.combined] == [False] * (len(ppo.combined) - 1) + [True]
    together = said.partition(" together ")[2].partition(": 7")[0]
    assert [together.count(one.change) for one in ppo.combined] == [1] * len(ppo.combined)
    pasted = planned(small, *given, *(one.change for one in ppo.combined), size="70b", count=8)
    assert pasted.stages[1].fits
    assert pasted.stages[1].workload is not None
    assert not [note for note in pasted.stages[1].workload.notes if "does not start" in note or "too large" in note]


@pytest.mark.parametrize("machine", [(), ("--gpu", "h100")])
def test_sharding_is_refused_for_one_process_as_the_stage_refuses_it(machine, small: Path, rlhf_here):
    settings = ("--set", "model.sharding=fsdp", "--set", "generation={}")
    code, said = rlhf_here("plan", small, "--no-trial", *machine, *settings)
    assert code == 2
    assert "divides a model among several processes, but there is only one" in said
    assert "--gpu NAME --gpus N" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--gpus", "8"), "`--gpus` needs `--gpu`"), (("--size", "8b"), "`--size` needs `--gpu`"),
     (("--gpu", "h1000"), "unknown GPU `h1000`"), (("--gpu", "h100", "--size", "9b"), "unknown size `9b`"),
     (("--gpu", "h100", "--gpus", "9", "--nodes", "2"), "9 GPUs cannot be divided among 2 nodes"),
     (("--gpu", "h100", "--server-gpus", "8"), "`--server-gpus` needs `generation.vllm_server`"),
     (("--gpu", "h100", "--gpus", "8", "--set", "model.sharding=fsdp", "--set", "generation={}", "--set",
       "model.sharding_size=3"), "makes groups of 3 processes, and 8 processes"),
     (("--gpu", "h100", "--gpus", "16", "--set", "generation.tensor_parallel_size=16"), "there are 8 processes on")],
)  # fmt: skip
def test_what_is_wrong_with_the_machines_is_said(arguments, message, small: Path, rlhf_here):
    code, said = rlhf_here("plan", small, *arguments)
    assert code == 2
    assert message in said
