"""`train_rm.require`: a reward model that is not good enough stops the run, and a lower requirement continues it."""

from __future__ import annotations

import pytest

from rlhf_cli.errors import EXIT_REQUIREMENT, RequirementError
from rlhf_cli.stages.reward_model.requirements import check_requirements
from rlhf_cli.stages.reward_model.settings import RequiredQuality, RewardModelSettings

METRICS = {
    "rm/accuracy": 0.55,
    "rm/accuracy_low": 0.42,
    "rm/accuracy_high": 0.68,
    "rm/calibration_error": 0.2,
    "rm/prompts": 60.0,
}


@pytest.mark.parametrize(
    ("required", "expected"),
    [
        pytest.param({}, None, id="nothing"),
        pytest.param({"accuracy": 0.55}, None, id="reached exactly"),
        pytest.param(
            {"accuracy": 0.6}, "accuracy is 0.550 (0.420 to 0.680, 60 prompts), and at least 0.6", id="a value"
        ),
        pytest.param({"accuracy_low": 0.5}, "accuracy_low is 0.420, and at least 0.5", id="an end of an interval"),
        pytest.param({"calibration_error": 0.2}, None, id="a maximum, reached exactly"),
        pytest.param({"calibration_error": 0.1}, "calibration_error is 0.200, and at most 0.1", id="a maximum"),
        pytest.param({"accuracy_longer_chosen": 0.1}, "no held-out pair has a longer preferred", id="nothing measured"),
    ],
)
def test_requirements_are_minima_but_for_the_calibration_error(required, expected, tmp_path):
    settings = RewardModelSettings(require=RequiredQuality(**required))
    if expected is None:
        check_requirements(settings, METRICS, tmp_path)
        return
    with pytest.raises(RequirementError) as caught:
        check_requirements(settings, METRICS, tmp_path)
    assert expected in caught.value.message
    assert f"--set train_rm.require.{next(iter(required))}=" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "value", "limit", "suggested"),
    [("accuracy", 0.7947, 0.9, 0.794), ("calibration_error", 0.1502, 0.1, 0.151)],
)
def test_the_suggested_requirement_is_met(name, value, limit, suggested, tmp_path):
    with pytest.raises(RequirementError) as caught:
        check_requirements(
            RewardModelSettings(require=RequiredQuality(**{name: limit})), {f"rm/{name}": value}, tmp_path
        )
    assert f"`--set train_rm.require.{name}={suggested}`" in (caught.value.hint or "")
    relaxed = RewardModelSettings(require=RequiredQuality(**{name: suggested}))
    check_requirements(relaxed, {f"rm/{name}": value}, tmp_path)


def test_all_failures_are_named_at_once(tmp_path):
    settings = RewardModelSettings(require=RequiredQuality(accuracy=0.6, calibration_error=0.1))
    with pytest.raises(RequirementError, match=r"accuracy is .*; calibration_error is ") as caught:
        check_requirements(settings, METRICS, tmp_path)
    both = "--set train_rm.require.accuracy=0.550 --set train_rm.require.calibration_error=0.200"
    assert both in (caught.value.hint or "")


def test_a_run_stops_after_the_reward_model_and_continues_once_less_is_required(toy):
    stopped = toy.rlhf("run", "recipe.yaml", "--set", "train_rm.require.accuracy=0.6")
    assert stopped.code == EXIT_REQUIREMENT == 78
    assert "accuracy is 0.550 (0.420 to 0.680, 60 prompts), and at least 0.6 is required" in stopped.stderr
    assert "`--set train_rm.require.accuracy=0.550`" in stopped.stderr
    assert [line.split()[0] for line in toy.ran()] == ["sft", "label", "train-rm"]
    assert (toy.run_dir / "train-rm" / "manifest.json").is_file()
    again = toy.rlhf("run", "recipe.yaml", "--set", "train_rm.require.accuracy=0.6")
    assert (again.code, toy.ran()) == (78, []), "a finished stage is held to it too"
    assert toy.rlhf("run", "recipe.yaml", "--dry-run", "--set", "train_rm.require.accuracy=0.6").code == 78
    alone = toy.rlhf("ppo", "recipe.yaml", "--run-dir", "runs/toy", "--set", "train_rm.require.accuracy=0.6")
    assert (alone.code, toy.ran()) == (78, []), "so is one that another command wrote"
    assert toy.run("--set", "train_rm.require.accuracy=0.5").code == 0
    assert [line.split()[0] for line in toy.ran()] == ["ppo", "evaluate"]


def test_an_unknown_metric_is_refused_by_validate(toy):
    refused = toy.rlhf("recipe", "validate", "recipe.yaml", "--set", "train_rm.require.acuracy=0.6")
    assert refused.code == 2
    assert "unknown setting `train_rm.require.acuracy`, did you mean `accuracy`?" in refused.stderr
    assert toy.rlhf("recipe", "validate", "recipe.yaml", "--set", "train_rm.require.accuracy=60").code == 2
