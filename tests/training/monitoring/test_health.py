"""Is the curve normal: every rule fires on a curve that has what it looks for, and on no healthy one.

`quickstart_metrics.jsonl` is the `metrics.jsonl` of `rlhf run recipes/quickstart.yaml` (PPO of 40 steps), with figures
rounded to four digits.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_cli.training.monitoring.curves import Curve
from rlhf_cli.training.monitoring.health import report as health
from rlhf_cli.training.monitoring.health.findings import Finding
from rlhf_cli.training.monitoring.metrics_log import read_rows

QUICKSTART = Path(__file__).with_name("quickstart_metrics.jsonl")
Row = dict[str, float | None]


def healthy(steps: int = 100, seed: int = 0) -> list[Row]:
    """A run as it should be, with noise in every figure."""
    noise = random.Random(seed).gauss
    rows: list[Row] = []
    for step in range(1, steps + 1):
        share = step / steps
        rows.append(
            {
                "step": step,
                "episode": 64.0 * step,
                "objective/scores": 1.5 * (1 - math.exp(-3 * share)) + noise(0, 0.1),
                "objective/scores_std": 0.9 - 0.3 * share + noise(0, 0.05),
                "objective/kl": 7 * share + noise(0, 0.3) * min(step, 5) / 5,
                "policy/entropy_avg": 1.2 - 0.5 * share + noise(0, 0.03),
                "policy/approxkl_avg": 0.006 * math.exp(noise(0, 0.3)),
                "policy/clipfrac_avg": 0.06 * math.exp(noise(0, 0.3)),
                "policy/epochs": 4.0,
                "loss/value_avg": 0.3 * math.exp(-2 * share + noise(0, 0.2)),
                "val/ratio": 1 + noise(0, 0.002),
                "val/ratio_var": 0.01 * math.exp(noise(0, 0.3)),
                "val/first_epoch_ratio": 1 + noise(0, 1e-5),
                "val/first_epoch_approxkl": 1e-8,
                "val/largest_log_ratio": 2 + abs(noise(0, 1)),
                "val/explained_variance": 0.8 - math.exp(-6 * share) + noise(0, 0.05),
                "val/num_eos_tokens": 60.0 + round(noise(0, 1)),
                "length/mean": 40 + 10 * share + noise(0, 1),
                "skipped_steps": 0.0,
            }
        )
        if step % 20 == 0:
            rows[-1]["eval/objective/scores"] = 1.3 * (1 - math.exp(-3 * share)) + noise(0, 0.1)
    return [{"step": 0, "eval/objective/scores": 0.0}, *rows]


def changed(name: str, make: Callable[[float, float], float], **arguments) -> list[Row]:
    """A healthy run but for one metric: `make` is given the share of the run that is done and the healthy value."""
    rows = healthy(**arguments)
    steps = rows[-1]["step"] or 1
    return [
        row if row.get(name) is None else row | {name: make((row["step"] or 0) / steps, row[name] or 0.0)}
        for row in rows
    ]


def unusual(rows: list[Row]) -> list[Finding]:
    return [finding for finding in health.judge(rows) if finding.severity != "fine"]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("steps", [12, 40, 200])
def test_a_healthy_run_gives_no_finding(steps, seed):
    assert unusual(healthy(steps, seed)) == []


def test_the_quickstart_gives_no_finding():
    findings = health.judge(read_rows(QUICKSTART))
    assert {finding.severity for finding in findings} == {"fine"}
    assert [finding.subject for finding in findings] == ["reward", "KL", "length", "update", "critic"]


CASES = [
    pytest.param("objective/scores", lambda t, v: 0.3 + v % 0.1, "reward", "look", "does not rise", id="reward flat"),
    pytest.param("objective/scores", lambda t, v: -v, "reward", "bad", "falls", id="reward falls"),
    pytest.param("objective/scores_std", lambda t, v: 0.0, "reward spread", "bad", "same reward", id="constant"),
    pytest.param(
        "objective/scores_std",
        lambda t, v: v if t < 0.6 else 0.01,
        "reward spread",
        "look",
        "hardly differ",
        id="saturated",
    ),
    pytest.param("objective/kl", lambda t, v: 6 * v, "KL", "look", "nats per completion", id="KL far"),
    pytest.param("objective/kl", lambda t, v: 12 * v, "KL", "bad", "nats per completion", id="KL too far"),
    pytest.param("objective/kl", lambda t, v: 24 * t**2 + v % 0.1, "KL", "look", "still growing", id="KL grows"),
    pytest.param("objective/kl", lambda t, v: -0.4 * v, "KL", "bad", "negative", id="KL negative"),
    pytest.param("policy/entropy_avg", lambda t, v: v * 0.1**t, "entropy", "look", "falls to", id="entropy low"),
    pytest.param("policy/entropy_avg", lambda t, v: v * 0.01**t, "entropy", "bad", "falls to", id="entropy gone"),
    pytest.param(
        "length/mean", lambda t, v: v * (1 + 2.5 * t), "length", "look", "grows without bound", id="length grows"
    ),
    pytest.param(
        "length/mean", lambda t, v: v * (1 + 9 * t), "length", "bad", "grows without bound", id="length runs away"
    ),
    pytest.param("length/mean", lambda t, v: v * (1 - 0.8 * t), "length", "look", "collapses", id="length shrinks"),
    pytest.param("length/mean", lambda t, v: v * 0.02**t, "length", "bad", "collapses", id="length collapses"),
    pytest.param(
        "val/num_eos_tokens", lambda t, v: v * (1 - 0.45 * t), "end tokens", "look", "at the start", id="fewer ends"
    ),
    pytest.param("val/num_eos_tokens", lambda t, v: 2.0, "end tokens", "bad", "3.1%", id="no ends"),
    pytest.param("val/first_epoch_ratio", lambda t, v: v + 0.02, "first ratio", "look", "0.020", id="first ratio off"),
    pytest.param("val/first_epoch_ratio", lambda t, v: v - 0.1, "first ratio", "bad", "0.100", id="first ratio wrong"),
    pytest.param("val/first_epoch_approxkl", lambda t, v: 0.005, "first ratio", "look", "5.0e-03", id="numeric noise"),
    pytest.param("policy/approxkl_avg", lambda t, v: 15 * v, "update", "look", "too large", id="steps large"),
    pytest.param("policy/approxkl_avg", lambda t, v: 60 * v, "update", "bad", "too large", id="steps too large"),
    pytest.param("policy/clipfrac_avg", lambda t, v: 5 * v, "update", "look", "too large", id="clipped often"),
    pytest.param("policy/clipfrac_avg", lambda t, v: 9 * v, "update", "bad", "too large", id="clipped mostly"),
    pytest.param("val/ratio_var", lambda t, v: 5.0 if t == 0.5 else v, "ratio", "look", "1 of 100", id="one spike"),
    pytest.param("val/ratio", lambda t, v: 1.3 if t > 0.7 else v, "ratio", "bad", "30 of 100", id="many spikes"),
    pytest.param("skipped_steps", lambda t, v: float(t == 0.3), "skipped steps", "look", "in step 30", id="a skip"),
    pytest.param("skipped_steps", lambda t, v: float(t > 0.5), "skipped steps", "bad", "50 of 100", id="many skips"),
    pytest.param("val/explained_variance", lambda t, v: v - 1.0, "critic", "look", "-0.2", id="critic is blind"),
    pytest.param("loss/value_avg", lambda t, v: v * 50**t, "value loss", "look", "grows", id="value loss grows"),
    pytest.param("loss/value_avg", lambda t, v: v * 900**t, "value loss", "bad", "grows", id="value loss explodes"),
    pytest.param(
        "eval/objective/scores", lambda t, v: 0.05 * v, "held-out reward", "look", "by 0.05 on", id="not held out"
    ),
    pytest.param(
        "eval/objective/scores", lambda t, v: v * (2 - 1.5 * t), "held-out reward", "look", "it was best", id="peaked"
    ),
]


@pytest.mark.parametrize(("metric", "make", "subject", "severity", "seen"), CASES)
def test_a_rule_fires_on_what_it_looks_for_and_no_other_does(metric, make, subject, severity, seen):
    (finding,) = unusual(changed(metric, make))
    assert (finding.subject, finding.severity) == (subject, severity)
    assert seen in finding.seen
    assert finding.means
    assert finding.change
    assert 0 <= finding.steps[0] <= finding.steps[1] <= 100


def test_a_rate_that_moves_nothing_is_seen():
    rows = [row | {"policy/approxkl_avg": 1e-9, "policy/clipfrac_avg": 0.0} for row in healthy()]
    (finding,) = unusual(rows)
    assert (finding.subject, finding.severity) == ("update", "look")
    assert "ppo.learning_rate" in finding.change[0]


@pytest.mark.parametrize(("moved", "direction"), [(0.2, "too large"), (1e-9, "almost zero")])
def test_the_minibatches_of_one_epoch_move_the_ratio(moved, direction):
    once = {"policy/approxkl_avg": moved, "val/first_epoch_approxkl": moved, "policy/clipfrac_avg": 0.0}
    rows = [row | once | {"policy/epochs": 1.0, "policy/optimizer_steps": 4.0} for row in healthy()]
    (finding,) = unusual(rows)
    assert finding.subject == "update"
    assert finding.seen.startswith(direction)


@pytest.mark.parametrize(("moved", "steps"), [(0.0, 1.0), (0.005, 4.0)], ids=["one minibatch", "several"])
def test_one_epoch_per_update_has_no_ratio_to_compare_with(moved, steps):
    once = {"policy/approxkl_avg": moved, "val/first_epoch_approxkl": moved, "policy/clipfrac_avg": 0.0}
    assert unusual([row | once | {"policy/epochs": 1.0, "policy/optimizer_steps": steps} for row in healthy()]) == []
    assert unusual([row | once | {"policy/epochs": 1.0} for row in healthy()]) == []
    # Files of before `policy/epochs` was written: equal figures tell.
    assert unusual([{k: v for k, v in (row | once).items() if k != "policy/epochs"} for row in healthy()]) == []


@pytest.mark.parametrize(
    "kl",
    [
        pytest.param(lambda step: -0.02 + 0.001 * (step % 3), id="rounding below zero"),
        pytest.param(lambda step: -0.5 + 3.0 * (-1) ** step, id="noise around zero"),
        pytest.param(lambda step: 20 * (1 - math.exp(-step / 40)), id="far, and levelling off"),
        pytest.param(lambda step: 0.09 * step, id="growing, and still near"),
    ],
)
def test_a_kl_that_is_as_it_should_be_gives_no_finding(kl):
    assert unusual([{"step": step, "objective/kl": kl(step)} for step in range(1, 101)]) == []


def test_a_reward_that_stays_where_it_is_is_explained_by_the_size_of_the_updates():
    for factor, expected in ((1.0, "too small"), (50.0, "too large to learn from")):
        rows = [
            row | {"objective/scores": 0.3 + 0.01 * ((row["step"] or 0) % 3)}
            | {"policy/approxkl_avg": factor * (row.get("policy/approxkl_avg") or 0.0)}
            for row in healthy()[1:]
        ]  # fmt: skip
        (found,) = (finding for finding in health.judge(rows) if finding.subject == "reward")
        assert expected in found.means


def test_noise_alone_is_not_taken_for_a_rise():
    """Of 200 runs in which nothing happens, the reward is said to rise in few."""
    said = 0
    for seed in range(200):
        noise = random.Random(seed).gauss
        rows = [{"step": step, "objective/scores": noise(0.1, 0.2)} for step in range(1, 41)]
        (found,) = (finding for finding in health.judge(rows) if finding.subject == "reward")
        said += found.severity == "fine"
    assert said < 20


def test_missing_and_null_metrics_are_not_judged():
    assert unusual([{"step": step, "skipped_steps": 0.0, "objective/kl": None} for step in range(1, 30)]) == []
    assert [finding.subject for finding in health.judge([])] == ["length of the run"]


def test_a_short_run_says_that_trends_are_not_judged():
    findings = health.judge(healthy(steps=5))
    assert [(finding.subject, finding.severity) for finding in findings] == [
        ("update", "fine"),
        ("length of the run", "fine"),
    ]


def test_findings_are_sorted_and_written_as_json(tmp_path):
    rows = changed("objective/kl", lambda t, v: 6 * v)
    rows[50]["skipped_steps"], rows[-1]["val/num_eos_tokens"] = 1.0, None
    for row in rows[1:]:
        row["objective/scores_std"] = 0.0
    findings = health.judge(rows)
    assert [finding.severity for finding in findings][:4] == ["bad", "look", "look", "fine"]
    health.write(tmp_path / "health.json", findings)
    read = json.loads((tmp_path / "health.json").read_text())
    assert read["verdict"] == "bad"
    assert read["findings"][0]["subject"] == "reward spread"
    assert set(read["findings"][0]) == {"subject", "severity", "seen", "means", "change", "steps", "completions"}
    assert health.verdict([]) == "fine"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_findings_fit_the_terminal(width):
    findings = [finding for case in CASES for finding in health.judge(changed(case.values[0], case.values[1]))]
    console = Console(width=width, record=True, force_terminal=True, file=io.StringIO())
    console.print(health.view(findings))
    lines = console.export_text().splitlines()
    assert max(len(line) for line in lines) <= width
    assert lines[0].startswith("is the curve normal? ")
    assert not any(line.rstrip().endswith("…") for line in lines)


def test_a_line_through_a_curve_is_that_of_least_squares():
    line = Curve((1, 2, 3, 4), (1.0, 3.0, 2.0, 4.0)).trend
    assert line.slope == pytest.approx(0.8)
    # Residuals -0.3, 0.9, -0.9, 0.3; their sum of squares 1.8 over 2 degrees of freedom and a spread of 5.
    assert line.error == pytest.approx(math.sqrt(1.8 / 2 / 5))
    assert Curve((1, 2, 3), (1.0, 2.0, 3.0)).trend.certainty == math.inf
    assert Curve((1, 2, 3), (2.0, 2.0, 2.0)).trend.certainty == 0.0
    assert Curve((1, 2), (1.0, 9.0)).trend.certainty == 0.0


def test_a_trend_does_not_count_as_noise():
    assert Curve((1, 2, 3, 4), (0.0, 2.0, 0.0, 2.0)).noise == pytest.approx(math.sqrt(2))
    assert Curve((1, 2, 3, 4), (0.0, 0.1, 0.2, 0.3)).noise == pytest.approx(0.1 / math.sqrt(2))
