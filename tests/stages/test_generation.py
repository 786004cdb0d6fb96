"""`generation.engine`: which generator a stage gets, what is said and recorded, and a stage with vLLM's stand-in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import ModelError, UsageError
from rlhf_cli.generation.generator import Generator
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.server_generator import VLLMServerGenerator
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.generation.vllm_generator import VLLMGenerator
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.pipeline.fingerprint import settings_of
from rlhf_cli.pipeline.preflight import preflight
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.pipeline.stage_run import manifest_settings
from rlhf_cli.progress import detail, say_once
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.shared import GenerationSettings
from rlhf_cli.stages.base import ENGINE_RECORD
from rlhf_cli.stages.generation import check_engine_groups, choose_generator
from rlhf_cli.stages.inputs import Input
from rlhf_cli.stages.ppo import run as ppo
from rlhf_cli.stages.registry import stage
from rlhf_cli.verbosity import Verbosity, set_verbosity
from tests.generation.scripted import ScriptedGenerator
from tests.generation.server_stand_in import server_of
from tests.generation.vllm_stand_in import vllm
from tests.stages.context import stage_context

__all__ = ["server_of", "vllm"]


@pytest.fixture
def usable(monkeypatch):
    """Nothing speaks against vLLM, although there is no GPU."""
    monkeypatch.setattr("rlhf_cli.generation.vllm_generator.obstacle", lambda policies: None)


def choose(
    folder: Path, model: Path, engine: str, given: Generator | None = None, server: str | None = None, size: int = 1
) -> Generator:
    say_once.cache_clear()
    detail.cache_clear()
    (folder / "work").mkdir(exist_ok=True)
    generation = {"engine": engine, "vllm_server": server, "tensor_parallel_size": size}
    recipe = Recipe.model_validate({"generation": generation, "label": {"by": "import", "data": "rankings.jsonl"}})
    context = stage_context("label", recipe, output=folder / "output", work=folder / "work")
    policy = Policy.load(ModelSource(str(model)), Sampling(max_new_tokens=4))
    return choose_generator(context, [policy], given)


def record(folder: Path) -> str:
    return (folder / "work" / ENGINE_RECORD).read_text()


@pytest.fixture
def verbose():
    set_verbosity(Verbosity.VERBOSE)
    yield
    set_verbosity(Verbosity.NORMAL)


@pytest.mark.parametrize(("engine", "checks"), [("auto", 0), ("auto", 2), ("vllm", 1), ("server", 0), ("server", 1)])
def test_no_process_loads_weights_before_all_say_that_they_go_on(
    engine, checks, vllm, usable, tiny_llama, tmp_path, monkeypatch
):
    """Process 1 finds nothing in the first checks, and then an obstacle. The second and the third load weights, which
    the processes may have to load together."""
    replies, events, load = [None, *[None] * checks, ["vllm is missing", "install it"]], [], Policy.model

    def exchanged(processes: ProcessGroup, item: object) -> list[object]:
        events.append("asks")
        return [item, replies.pop(0)]

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ProcessGroup, "all_gather_object", exchanged)
    monkeypatch.setattr(Policy, "model", lambda policy: events.append("loads") or load(policy))
    monkeypatch.setattr("rlhf_cli.generation.server_obstacle.server_obstacle", lambda policies: None)
    server = "http://localhost:8000" if engine == "server" else None
    if engine == "auto":
        assert isinstance(choose(tmp_path, tiny_llama, engine), TorchGenerator)
    else:
        with pytest.raises(ModelError, match="in process 1 vllm is missing") as caught:
            choose(tmp_path, tiny_llama, "vllm" if server is None else "auto", server=server)
        assert caught.value.hint == "install it"
    assert events == ["asks", "asks", *["loads", "asks"] * checks], "first what drew before an interruption"


def test_what_everybody_expects_is_a_detail(tiny_llama, tmp_path, capsys):
    for engine in ("auto", "torch"):
        (tmp_path / engine).mkdir()
        choose(tmp_path / engine, tiny_llama, engine)
    assert "completions are drawn" not in capsys.readouterr().err


def test_auto_is_torch_where_there_is_no_gpu_and_says_why(verbose, tiny_llama, tmp_path, capsys):
    assert isinstance(choose(tmp_path, tiny_llama, "auto"), TorchGenerator)
    said = capsys.readouterr().err
    assert "label: completions are drawn with torch: the device is `cpu`, and vllm is supported on CUDA only\n" in said
    assert record(tmp_path) == "torch\n"


def test_auto_is_vllm_where_nothing_speaks_against_it(vllm, usable, tiny_llama, tmp_path, capsys):
    assert isinstance(choose(tmp_path, tiny_llama, "auto"), VLLMGenerator)
    assert "label: completions are drawn with vllm 0.32.0\n" in capsys.readouterr().err
    assert record(tmp_path) == "vllm 0.32.0\n"
    assert vllm.made[0].calls == ["load", "reset"], "it is started"


def test_auto_is_torch_where_vllm_does_not_start(verbose, vllm, usable, tiny_llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vllm, "off_by", 9.0)
    assert isinstance(choose(tmp_path, tiny_llama, "auto"), TorchGenerator)
    assert "drawn with torch: vllm and the policy" in " ".join(capsys.readouterr().err.split())
    assert vllm.made[0].calls[-1] == "sleep 2", "its memory is free again"


def test_vllm_is_an_error_where_it_cannot_be(tiny_llama, tmp_path):
    with pytest.raises(ModelError, match=r"`generation\.engine: vllm`, but the device is `cpu`") as caught:
        choose(tmp_path, tiny_llama, "vllm")
    assert "--set generation.engine=torch" in caught.value.hint
    assert not (tmp_path / "work" / ENGINE_RECORD).exists()


def test_vllm_that_does_not_start_is_an_error(vllm, usable, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "off_by", 9.0)
    with pytest.raises(ModelError, match="log-probabilities differ"):
        choose(tmp_path, tiny_llama, "vllm")


def test_torch_says_that_it_was_asked_for(verbose, vllm, usable, tiny_llama, tmp_path, capsys):
    assert isinstance(choose(tmp_path, tiny_llama, "torch"), TorchGenerator)
    assert "label: completions are drawn with torch\n" in capsys.readouterr().err
    assert vllm.made == []


@pytest.mark.parametrize("first", ["torch", "vllm"])
def test_a_stage_that_resumes_keeps_its_engine(first, vllm, usable, tiny_llama, tmp_path, capsys):
    choose(tmp_path, tiny_llama, first)
    kind = type(choose(tmp_path, tiny_llama, "auto"))
    assert kind is (TorchGenerator if first == "torch" else VLLMGenerator)
    assert "as before the interruption" in capsys.readouterr().err


def test_a_stage_that_resumes_without_its_engine_says_so(tiny_llama, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / ENGINE_RECORD).write_text("vllm 0.32.0\n")
    with pytest.raises(ModelError, match="vllm drew completions before the interruption, but") as caught:
        choose(tmp_path, tiny_llama, "auto")
    assert "--force" in caught.value.hint


def test_a_generator_that_is_given_takes_the_place_of_a_choice(tiny_llama, tmp_path):
    given = ScriptedGenerator()
    assert choose(tmp_path, tiny_llama, "vllm", given) is given


def test_ppo_with_vllm(vllm, usable, tiny_llama, tmp_path):
    """The engine follows the policy, whose probabilities are those under which it draws."""
    (tmp_path / "judge.py").write_text(
        "def score(prompts, completions):\n    return [len(one) for one in completions]\n"
    )
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Q {n}?"}) + "\n" for n in range(12)))
    section = {"steps": 3, "prompts_per_step": 4, "max_new_tokens": 6, "epochs": 1, "learning_rate": 0.1}
    shared = {"model": {"precision": "float32", "device": "cpu"}, "generation": {"engine": "vllm"}}
    rewards = {"rewards": [{"function": f"{tmp_path / 'judge.py'}:score"}], "ratio_limit": 1e6}
    for part in ("output", "work"):
        (tmp_path / part).mkdir()
    ppo.run(
        stage_context(
            "ppo",
            Recipe.model_validate(shared | {"ppo": section | rewards}),
            output=tmp_path / "output",
            work=tmp_path / "work",
            policy=tiny_llama,
            prompts=tmp_path / "prompts.jsonl",
        )
    )
    rows = [json.loads(line) for line in (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert rows[-1]["objective/kl_per_token"] != pytest.approx(0.0, abs=1e-3), "the policy has moved"
    for row in rows:
        assert row["generation/drift_kl"] == pytest.approx(0.0, abs=1e-4)
        assert row["generation/drift_max"] < 1e-3
        assert row["generation/importance_weight"] == pytest.approx(1.0, abs=1e-3)
        assert row["generation/truncated"] == 0.0
    (llm,) = vllm.made
    assert llm.calls.count("load") == 4
    assert llm.calls[-1] == "sleep 2"


def test_settings_without_effect_are_refused():
    with pytest.raises(ValueError, match="no effect with `engine: torch`"):
        GenerationSettings(engine="torch", gpu_memory_utilization=0.5)
    with pytest.raises(ValueError, match="no effect with `engine: torch`"):
        GenerationSettings(engine="torch", vllm_server="http://localhost:8000")
    with pytest.raises(ValueError, match="no effect without `vllm_server`"):
        GenerationSettings(server_timeout=5.0)
    with pytest.raises(ValueError, match="no effect with `engine: torch`"):
        GenerationSettings(engine="torch", tensor_parallel_size=2)
    with pytest.raises(ValueError, match="`tensor_parallel_size` needs `engine: vllm`"):
        GenerationSettings(tensor_parallel_size=2)
    with pytest.raises(ValueError, match="no effect with `vllm_server`"):
        GenerationSettings(vllm_server="http://localhost:8000", gpu_memory_utilization=0.5)
    with pytest.raises(ValueError, match="give `vllm serve` the option `--tensor-parallel-size`"):
        GenerationSettings(vllm_server="http://localhost:8000", tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("size", "count", "of_machine", "found"),
    [
        (2, 1, None, "there is one process"),
        (4, 12, 6, "there are 6 processes on each machine"),
        (3, 8, 8, "there are 8 processes on each machine"),
        pytest.param(8, 1, 8, "there is one process", id="LOCAL_WORLD_SIZE is left over from a launcher"),
        pytest.param(4, 6, 4, "there are 6 processes$", id="a machine with more processes than the others"),
    ],
)
def test_processes_that_cannot_be_grouped_around_an_engine_are_refused(size, count, of_machine, found):
    with pytest.raises(UsageError, match=rf"`generation\.tensor_parallel_size: {size}` needs .* {found}") as caught:
        check_engine_groups(GenerationSettings(engine="vllm", tensor_parallel_size=size), count, of_machine)
    assert f"start a multiple of {size} with `--processes`" in caught.value.hint
    check_engine_groups(GenerationSettings(engine="vllm", tensor_parallel_size=2), 12, 6)
    check_engine_groups(GenerationSettings(), 1, None)
    check_engine_groups(GenerationSettings(), 3, None)


@pytest.mark.parametrize("count", [4, 8])
def test_an_engine_needs_to_know_which_processes_are_on_its_machine(count):
    """Four processes may be two on each of two machines."""
    with pytest.raises(UsageError, match="needs a launcher that sets LOCAL_WORLD_SIZE") as caught:
        check_engine_groups(GenerationSettings(engine="vllm", tensor_parallel_size=4), count, None)
    assert caught.value.setting == "generation.tensor_parallel_size"


def test_one_process_cannot_share_an_engine(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match=r"`generation\.tensor_parallel_size: 2` needs groups of 2 processes"):
        choose(tmp_path, tiny_llama, "vllm", size=2)
    assert not (tmp_path / "work" / ENGINE_RECORD).exists()


def test_a_model_that_vllm_does_not_divide_is_refused_before_it_is_loaded(vllm, tiny_llama):
    recipe = Recipe.model_validate(
        {"model": {"path": str(tiny_llama)}, "generation": {"engine": "vllm", "tensor_parallel_size": 3}}
    )
    given = Input("model", str(tiny_llama), "model.path", role="policy", sampled_by="evaluate")
    with pytest.raises(UsageError, match=r"`generation\.tensor_parallel_size: 3`: its \d attention heads cannot be"):
        preflight(recipe, [given])


def test_processes_that_cannot_share_an_engine_are_refused_before_the_stage_begins(
    vllm, rlhf_here, tiny_llama, tmp_path
):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Why?"}\n')
    (tmp_path / "rate.py").write_text("def score(p, c):\n    return [0.0 for _ in c]\n")
    given = ["best-of-n", "--policy", tiny_llama, "--prompts", "p.jsonl", "--function", "rate.py:score"]
    changes = ("generation.engine=vllm", "generation.tensor_parallel_size=2", "data.prompt_template=null")
    code, said = rlhf_here(*given, *(part for change in changes for part in ("--set", change)), "--run-dir", "run")
    assert code == 2
    assert "`generation.tensor_parallel_size: 2` needs groups of 2 processes on one machine, and there is one" in said
    assert "best-of-n: starting" not in said


@pytest.mark.parametrize("recorded", [None, "vllm 0.32.0"])
def test_the_manifest_says_what_drew_completions(recorded, tmp_path):
    if recorded is not None:
        (tmp_path / ENGINE_RECORD).write_text(f"{recorded}\n")
    recipe = Recipe.model_validate({"label": {"by": "import", "data": "rankings.jsonl"}})
    settings = manifest_settings(recipe, stage("label"), tmp_path / ENGINE_RECORD)
    defaults = {"gpu_memory_utilization": 0.3, "vllm_server": None, "server_timeout": 300.0, "tensor_parallel_size": 1}
    assert settings["generation"] == {"engine": recorded or "auto"} | defaults


def test_the_engine_counts_where_a_stage_samples_and_its_memory_does_not():
    recipe = Recipe.model_validate({"sft": {"data": "d.jsonl"}, "ppo": {"rewards": [{"function": "f.py:f"}]}})
    assert settings_of(stage("ppo"), recipe)["generation.engine"] == "auto"
    assert "generation.gpu_memory_utilization" not in settings_of(stage("ppo"), recipe)
    assert "generation.engine" not in settings_of(stage("sft"), recipe)


def test_the_record_alone_is_no_work_to_resume(tmp_path):
    run = RunDirectory(tmp_path)
    run.begin("ppo", {"settings": {}}, resume=False)
    (run.work("ppo") / ENGINE_RECORD).write_text("torch\n")
    assert run.began("ppo") is None


def test_vllm_that_is_asked_for_and_not_installed_is_an_error_before_the_first_stage():
    with pytest.raises(UsageError, match=r"`generation\.engine: vllm` needs vllm, which is not installed"):
        preflight(Recipe.model_validate({"generation": {"engine": "vllm"}}), [])
    with pytest.raises(UsageError, match=r"`generation\.vllm_server` needs vllm, which is not installed"):
        preflight(Recipe.model_validate({"generation": {"vllm_server": "http://localhost:8000"}}), [])


def test_a_server_draws_where_one_is_named(vllm, server_of, tiny_llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rlhf_cli.generation.server_obstacle.server_obstacle", lambda policies: None)
    server = server_of(tiny_llama)
    server.longest = 4096
    for _ in range(2):
        chosen = choose(tmp_path, tiny_llama, "auto", server=server.url)
        assert isinstance(chosen, VLLMServerGenerator)
        assert f"completions are drawn with vllm 0.32.0: on {server.url}\n" in capsys.readouterr().err.replace(
            "as before the interruption, ", ""
        )
    assert record(tmp_path) == "vllm 0.32.0\n"


def test_a_server_that_cannot_be_used_is_an_error(tiny_llama, tmp_path):
    with pytest.raises(ModelError, match=r"`generation\.vllm_server`: the device is `cpu`"):
        choose(tmp_path, tiny_llama, "auto", server="http://localhost:8000")
