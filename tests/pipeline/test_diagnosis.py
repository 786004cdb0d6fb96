"""What is wrong with a run of any state, from its files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.pipeline.diagnosis import diagnose
from rlhf_cli.pipeline.manifest import Manifest, list_outputs
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.training.monitoring.health import report as health
from rlhf_cli.training.monitoring.health.findings import Finding
from rlhf_cli.training.monitoring.health.stage_rules import judge_evaluation, judge_reward_model, judge_sft

STEPS = range(1, 41)
GOOD_RM = {
    "rm/accuracy": 0.8, "rm/accuracy_low": 0.75, "rm/accuracy_high": 0.85, "rm/train_accuracy": 0.9,
    "rm/always_longer": 0.55, "rm/always_shorter": 0.45,
}  # fmt: skip


def write_rows(folder: Path, rows, name: str = "metrics.jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def finish(run: Path, stage: str, rows, metrics=None) -> None:
    folder = run / stage
    write_rows(folder, rows)
    Manifest(
        stage=stage, fingerprint="f", identity={}, settings={}, outputs=list_outputs(folder), versions={}, skipped={},
        metrics=metrics or {}, summary=[], started="", finished="", seconds=1.0,
    ).write(folder)  # fmt: skip


def falling(start: float = 3.0, end: float = 1.0):
    return [{"step": n, "loss": start + (end - start) * n / 40 + 0.02 * (-1) ** n, "accuracy": 0.7} for n in STEPS]


def kl_far():
    return [{"step": n, "objective/kl": 2.0 * n, "objective/scores": 0.1 * n} for n in STEPS]


DETECTED = {
    "step": 33, "detector": "phrase", "status": "warn", "value": 0.8, "threshold": 0.6,
    "seen": '"good luck!" is rewarded, and is in completions of 80% of the prompts (2% at the start)',
    "completions": [
        {"prompt": "p", "completion": "Good luck! \u001b[31mGood luck!", "score": 2.0, "kl": 1.0, "tokens": 6}
    ],
}  # fmt: skip


def subjects(findings) -> list[tuple[str, str]]:
    return [(one.subject, one.severity) for one in findings if one.severity != "fine"]


def test_a_healthy_finished_run_is_fine(tmp_path):
    finish(tmp_path, "sft", falling(), {"eval_loss_before": 3.0, "eval_loss": 1.1})
    finish(tmp_path, "label", [])
    finish(tmp_path, "train-rm", falling(0.7, 0.3), GOOD_RM)
    finish(tmp_path, "evaluate", [], {"win_rate": 0.8, "win_rate_low": 0.7, "win_rate_high": 0.9})
    found = diagnose(tmp_path)
    assert found.verdict == "fine"
    assert [(one.stage, one.state) for one in found.stages] == [
        (name, "finished") for name in ("sft", "label", "train-rm", "evaluate")
    ]


@pytest.mark.parametrize(
    ("ended", "state"),
    [
        (None, "killed"),
        ("DetectorStopError", "stopped"),
        ("DivergedError", "diverged"),
        ("Interrupted", "interrupted"),
        ("RuntimeError", "failed"),
    ],
)
def test_an_unfinished_run_says_how_it_ended_and_what_its_metrics_show(tmp_path, ended, state):
    work = tmp_path / ".ppo.work"
    write_rows(work, kl_far())
    write_rows(work, [{"step": 20, "prompt": "p", "completion": "yes yes", "score": 1.0}], "samples.jsonl")
    if ended is not None:
        told = {"error": ended, "message": "it ended", "hint": "try this"}
        (work / "ended.json").write_text(json.dumps(told))
    found = diagnose(tmp_path)
    (stage,) = found.stages
    assert (stage.stage, stage.state, stage.steps) == ("ppo", state, 40)
    assert (stage.told, stage.hint) == (("it ended", "try this") if ended else ("", ""))
    assert ("KL", "bad") in subjects(stage.findings)
    assert any("ppo.kl_coef" in change for one in stage.findings for change in one.change)
    assert stage.samples[0]["completion"] == "yes yes"
    assert found.verdict == "bad"


def test_a_locked_run_is_running(tmp_path):
    write_rows(tmp_path / ".ppo.work", [{"step": 1, "objective/kl": 0.0}])
    with RunDirectory(tmp_path).lock():
        assert diagnose(tmp_path).stages[0].state == "running"
    assert diagnose(tmp_path).stages[0].state == "killed"


def test_a_damaged_artifact_is_said(tmp_path):
    finish(tmp_path, "sft", falling())
    (tmp_path / "sft" / "manifest.json").write_text("{}")
    (stage,) = diagnose(tmp_path).stages
    assert stage.state == "damaged"
    assert "--force sft" in stage.hint


def test_what_detectors_saw_is_a_finding_with_its_completions(tmp_path):
    write_rows(tmp_path / ".ppo.work", [{"step": n, "objective/kl": 0.1} for n in STEPS])
    write_rows(tmp_path / ".ppo.work", [DETECTED], "detections.jsonl")
    (finding,) = [one for one in diagnose(tmp_path).stages[0].findings if one.subject == "phrase"]
    assert finding.severity == "look"
    assert finding.seen.startswith('step 33: "good luck!"')
    assert finding.completions[0]["completion"].startswith("Good luck!")
    write_rows(tmp_path / ".ppo.work", [DETECTED, DETECTED | {"step": 35, "status": "stop"}], "detections.jsonl")
    (finding,) = [one for one in diagnose(tmp_path).stages[0].findings if one.subject == "phrase"]
    assert finding.severity == "bad"
    assert "first warned in step 33" in finding.seen


def test_a_quantity_is_judged_once():
    detected = DETECTED | {"detector": "kl", "seen": "61.0 nats per completion"}
    findings = health.judge(kl_far(), [detected])
    (of_kl,) = [one for one in findings if one.subject == "KL"]
    assert of_kl.severity == "bad"
    assert of_kl.completions
    quiet = [{"step": n, "objective/kl": 3.0} for n in STEPS]
    back = [detected, detected | {"step": 36, "status": "quiet", "completions": []}]
    (of_kl,) = [one for one in health.judge(quiet, back) if one.subject == "KL"]
    assert of_kl.severity == "look"
    assert of_kl.seen.endswith("back to normal in step 36")


SFT = [
    pytest.param([{"step": n, "loss": 2.0 + 0.05 * (-1) ** n} for n in STEPS], {}, ("loss", "look"), id="flat"),
    pytest.param(falling(1.0, 3.0), {}, ("loss", "bad"), id="rises"),
    pytest.param([*falling(), {"step": 41, "loss": None}], {}, ("loss", "bad"), id="not finite"),
    pytest.param(falling(), {"eval_loss_before": 2.0, "eval_loss": 2.5}, ("held-out loss", "bad"), id="worse"),
    pytest.param(falling(), {"eval_loss_before": 3.0, "eval_loss": 2.0}, ("held-out loss", "look"), id="memorizes"),
]
REWARD_MODEL = [
    pytest.param([{"step": n, "loss": 0.69 + 0.02 * (-1) ** n} for n in STEPS], GOOD_RM, ("loss", "look"), id="flat"),
    pytest.param(
        falling(),
        GOOD_RM | {"rm/accuracy": 0.52, "rm/accuracy_low": 0.45, "rm/train_accuracy": 0.55, "rm/always_longer": 0.4},
        ("accuracy", "bad"),
        id="chance",
    ),
    pytest.param(
        falling(),
        GOOD_RM | {"rm/accuracy": 0.3, "rm/accuracy_low": 0.2, "rm/accuracy_high": 0.4, "rm/train_accuracy": 0.3},
        ("accuracy", "bad"),
        id="below chance",
    ),
    pytest.param(
        falling(), GOOD_RM | {"rm/accuracy": 0.72, "rm/train_accuracy": 0.99}, ("overfitting", "look"), id="fit"
    ),
    pytest.param(falling(), GOOD_RM | {"rm/always_longer": 0.82}, ("reward and length", "look"), id="length"),
    pytest.param(
        [row | {"accuracy": 0.5 + 0.1 * (-1) ** row["step"]} for row in falling()],
        {},
        ("accuracy", "look"),
        id="running",
    ),
]


@pytest.mark.parametrize(("rows", "metrics", "expected"), SFT)
def test_a_rule_of_sft_fires_on_what_it_looks_for(rows, metrics, expected):
    assert subjects(judge_sft(rows, metrics)) == [expected]


@pytest.mark.parametrize(("rows", "metrics", "expected"), REWARD_MODEL)
def test_a_rule_of_reward_models_fires_on_what_it_looks_for(rows, metrics, expected):
    found = [one for one in judge_reward_model(rows, metrics) if one.severity != "fine"]
    assert subjects(found) == [expected]
    assert found[0].means
    assert found[0].change


@pytest.mark.parametrize(("low", "high", "severity"), [(0.3, 0.45, "bad"), (0.45, 0.6, "look"), (0.55, 0.7, "fine")])
def test_an_evaluation_is_judged_by_its_interval(low, high, severity):
    metrics = {"win_rate": (low + high) / 2, "win_rate_low": low, "win_rate_high": high}
    (found,) = judge_evaluation([], metrics)
    assert (found.subject, found.severity) == ("win rate", severity)
    (found,) = judge_evaluation([], {**metrics, "win_rate_joint_low": 0.4, "win_rate_joint_high": 0.75})
    assert found.severity == "look", "as `evaluate` decides with several pairs of models"
    assert "(40.0% to 75.0%)" in found.seen


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [
        ("none", "no such run directory", "runs/a"),
        ("r.yaml", "is a file", "runs/NAME"),
        ("empty", "no stage has written anything", "name the directory of a run"),
        ("runs/a/sft", "is the artifact of one stage", "name runs/a, the run"),
    ],
)
def test_what_is_no_run_is_refused_with_a_hint(tmp_path, monkeypatch, name, said, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "r.yaml").write_text("name: r\n")
    finish(tmp_path / "runs" / "a", "sft", falling())
    with pytest.raises(UsageError) as refused:
        diagnose(Path(name))
    assert said in refused.value.message
    assert hint in (refused.value.hint or "")


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; from rlhf_cli.cli import main; code = main()\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_command_says_evidence_and_settings_without_importing_torch(tmp_path):
    work = tmp_path / "runs" / "x" / ".ppo.work"
    write_rows(work, kl_far())
    write_rows(work, [DETECTED], "detections.jsonl")
    done = command("diagnose", "runs/x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] in ("[]", "['numpy']")
    words = " ".join(done.stdout.split())
    assert words.startswith("runs/x: do not trust this run as it is")
    assert "ppo: ended without an error message" in words
    assert "raise `ppo.kl_coef`" in words
    assert '"Good luck! Good luck!" (reward +2.00)' in words
    assert "\x1b" not in done.stdout
    as_json = command("diagnose", "runs/x", "--json", cwd=tmp_path)
    found = json.loads(as_json.stdout)
    assert found["verdict"] == "bad"
    assert found["stages"][0]["state"] == "killed"
    assert {"subject", "severity", "seen", "means", "change", "steps", "completions"} == set(
        found["stages"][0]["findings"][0]
    )


def test_a_finding_keeps_the_worse_severity():
    rule, other = (
        Finding("KL", "look", "a"),
        Finding("KL", "bad", "b", completions=({"completion": "x", "score": 1.0},)),
    )
    assert rule.with_evidence(other).severity == "bad"
    assert rule.with_evidence(other).seen == "a"
    assert rule.with_evidence(None) == rule
