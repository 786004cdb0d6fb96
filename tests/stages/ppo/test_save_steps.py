"""Policies of `ppo.save_steps`: each is what a shorter run would have written, and writing them changes nothing."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from rlhf_cli.errors import Interrupted
from rlhf_cli.stages.ppo.model_saving import StepPolicies, saved_steps
from rlhf_cli.stages.ppo.settings import PPOSettings


@pytest.fixture
def files(tmp_path: Path, tiny_llama: Path) -> None:
    """A model in the run directory, prompts and a reward."""
    shutil.copytree(tiny_llama, tmp_path / "run" / "start")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(12)))
    (tmp_path / "rate.py").write_text("def score(p, c):\n    return [float(text.count('e')) for text in c]\n")


def arguments(run: str, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "ppo.steps": 5, "ppo.prompts_per_step": 4, "ppo.max_new_tokens": 6, "ppo.epochs": 1, "ppo.checkpoint_steps": 1,
        "ppo.learning_rate": 0.01, "data.prompt_template": "null", "model.precision": "float32",
        "ppo.schedule": "constant",
    } | {name.replace("__", "."): value for name, value in changes.items()}  # fmt: skip
    pairs = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    given = ["--model", "run/start", "--prompts", "p.jsonl", "--function", "rate.py:score", "--run-dir", run]
    return ["ppo", *given, *pairs]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_each_policy_is_that_of_a_shorter_run(rlhf_here, files, adapter, precision, tmp_path):
    kind = {"ppo__adapter": adapter, "model__precision": precision}
    for run, changes in {"run": {"ppo__save_steps": 2}, "plain": {}, "short": {"ppo__steps": 4}}.items():
        code, said = rlhf_here(*arguments(run, **kind, **changes))
        assert code == 0, said
    saved = tmp_path / "run/ppo/steps"
    assert sorted(path.name for path in saved.iterdir()) == ["2", "4"]
    short = tmp_path / "short/ppo"
    for name in ("model.safetensors", "generation_config.json", "config.json", "contract.json"):
        assert (saved / "4" / name).read_bytes() == (short / name).read_bytes(), name
    assert (saved / "2" / "model.safetensors").read_bytes() != (short / "model.safetensors").read_bytes()
    if adapter == "lora":
        assert (saved / "4/adapter/adapter_model.safetensors").read_bytes() == (
            short / "adapter/adapter_model.safetensors"
        ).read_bytes()
        base = json.loads((saved / "4/adapter/base.json").read_text())
        assert base["path"] == "../../../start", "the run can be moved"
        assert base | {"path": ""} == json.loads((short / "adapter/base.json").read_text()) | {"path": ""}
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "run/ppo" / name).read_bytes() == (tmp_path / "plain/ppo" / name).read_bytes(), name


@pytest.mark.slow
def test_they_outlive_a_kill_and_those_of_repeated_steps_are_replaced(rlhf_here, files, tmp_path, monkeypatch):
    assert rlhf_here(*arguments("whole", ppo__save_steps=1))[0] == 0
    save = StepPolicies.save

    def stopped(self, step, probe):
        save(self, step, probe)
        if step == 3:
            raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(StepPolicies, "save", stopped)
        assert rlhf_here(*arguments("run", ppo__save_steps=1))[0] == 143
    assert sorted(path.name for path in (tmp_path / "run/.ppo.work/steps").iterdir()) == ["1", "2", "3"]
    (tmp_path / "run/.ppo.work/steps/3/model.safetensors").write_bytes(b"torn")
    code, said = rlhf_here(*arguments("run", ppo__save_steps=1))
    assert code == 0, said
    for step in range(1, 5):
        first, second = (load_file(tmp_path / run / f"ppo/steps/{step}/model.safetensors") for run in ("whole", "run"))
        assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.slow
def test_a_kill_while_the_artifact_is_completed_loses_none(rlhf_here, files, tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr("rlhf_cli.training.monitoring.health.report.write", killed)
        assert rlhf_here(*arguments("run", ppo__save_steps=2))[0] == 143
    code, said = rlhf_here(*arguments("run", ppo__save_steps=2))
    assert code == 0, said
    assert sorted(path.name for path in (tmp_path / "run/ppo/steps").iterdir()) == ["2", "4"]


def test_partial_ones_and_those_beyond_the_last_step_are_not_published(tmp_path):
    for name in ("2", "10", "12", ".14", "notes"):
        (tmp_path / name).mkdir()
    assert [path.name for path in saved_steps(tmp_path, up_to=10)] == ["2", "10"]


def test_a_save_that_never_comes_is_refused():
    with pytest.raises(ValidationError, match="`save_steps: 40` has no effect with `steps: 40`"):
        PPOSettings(steps=40, save_steps=40)


@pytest.mark.slow
def test_they_are_policies_of_an_evaluation(rlhf_here, files, tmp_path):
    assert rlhf_here(*arguments("run", ppo__save_steps=2))[0] == 0
    code, said = rlhf_here(
        "evaluate", "--baseline", "run/start", "--policy", "run/ppo", "--also", "step 2=run/ppo/steps/2",
        "--also", "run/ppo/steps/4", "--prompts", "p.jsonl", "--function", "rate.py:score", "--run-dir", "run", "--set",
        "evaluate.trained_prompts=use", "--set", "data.prompt_template=null",
    )  # fmt: skip
    assert code == 0, said
    evaluation = json.loads((tmp_path / "run/evaluate/evaluation.json").read_text())
    assert list(evaluation["models"]) == ["start", "run/ppo", "step 2", "run/ppo/steps/4"]
    assert all("kl_nats" in pair for pair in evaluation["pairs"][:3])
    code, said = rlhf_here(
        "evaluate", "--baseline", "run/start", "--policy", "run/ppo/steps/2", "--prompts", "p.jsonl", "--function",
        "rate.py:score", "--run-dir", "other", "--set", "data.prompt_template=null",
    )  # fmt: skip
    assert code == 65, "its contract names the prompts that it was trained on"
    assert "of its prompts were in the training of run/ppo/steps/2" in said
