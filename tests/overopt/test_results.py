"""From the files of runs to curves, and from curves to where to stop."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rlhf_cli.data.records import Message, PromptRecord
from rlhf_cli.errors import DataError
from rlhf_cli.overopt.measurements import Checkpoints, Course, best_of_n_course, ppo_course
from rlhf_cli.overopt.plot import draw
from rlhf_cli.overopt.recipes import Proxy
from rlhf_cli.overopt.results import Optimized, Result, table
from rlhf_cli.stages.best_of_n.samples import read_samples
from rlhf_cli.statistics.best_of_n import kl_bound

STEPS = (0, 2, 4)


def write_samples(run: Path, rewards: list[list[float]]) -> Path:
    folder = run / "best-of-n"
    folder.mkdir(parents=True)
    rows = [
        {"prompt": f"p{n}", "completions": [f"c{k}" for k in range(len(row))], "rewards": row}
        for n, row in enumerate(rewards)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def write_ppo(run: Path, *, score=lambda prompt, step: step + prompt) -> Path:
    (run / "ppo").mkdir(parents=True)
    rows = [
        {"step": step, "prompt": f"p{n}", "completion": f"{step} {n}", "score": score(n, step), "kl": step * 1.0}
        for step in STEPS
        for n in range(2)
    ]
    (run / "ppo" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_best_of_n_chooses_by_the_proxy_and_measures_by_gold(tmp_path):
    base = write_samples(tmp_path / "base", [[0.0, 1.0], [5.0, 3.0]])
    runs = [write_samples(tmp_path / "a", [[1.0, 2.0], [0.0, 4.0]]), write_samples(tmp_path / "b", [[2, 1], [1, 0]])]
    course = best_of_n_course(base, runs)
    assert list(course.points) == [1, 2]
    assert course.proxy[0].tolist() == [[1.5, 2.0], [2.0, 4.0]]
    assert course.gold[0].tolist() == [[0.5, 1.0], [4.0, 3.0]]
    assert course.gain[1].tolist() == [[0.0, -0.5], [0.0, 1.0]]
    assert course.kl[1, 0].tolist() == [0.0, kl_bound(2)]


def test_the_samples_of_ppo_become_a_file_for_gold(tmp_path):
    run = write_ppo(tmp_path / "run")
    read = Checkpoints.read(run)
    assert (read.steps, read.prompts) == (list(STEPS), ["p0", "p1"])
    conversation = (Message("user", "p1"),)
    read.write(tmp_path / "s.jsonl", [PromptRecord("p0"), PromptRecord(conversation)])
    rows = read_samples(tmp_path / "s.jsonl")
    assert [row.prompt for row in rows] == ["p0", conversation]
    assert rows[1].completions == ["0 1", "2 1", "4 1"]


def test_the_course_of_ppo_joins_proxy_kl_and_gold(tmp_path):
    runs = [write_ppo(tmp_path / name) for name in "ab"]
    for run in runs:
        write_samples(run / "gold", [[0.0, 1.0, 0.5], [1.0, 2.0, 0.0]])
    course = ppo_course(runs)
    assert course.kl.shape == (2, 2, 3)
    assert course.proxy_gain[0].tolist() == [[0, 2, 4], [0, 2, 4]]
    assert course.gain[0].tolist() == [[0, 1, 0.5], [0, 1, -1]]


@pytest.mark.parametrize("score", [lambda prompt, step: None, None], ids=["not finite", "no file"])
def test_ppo_without_rewards_is_refused(tmp_path, score):
    if score is not None:
        write_ppo(tmp_path / "run", score=score)
    with pytest.raises(DataError, match="expected rewards and log-ratios"):
        Checkpoints.read(tmp_path / "run")


def optimized(method: str, alpha: float, beta: float) -> Optimized:
    points = [1, 2, 4, 8, 16, 32] if method == "best-of-n" else [0, 2, 4, 6, 8, 10, 12]
    distance = np.array([math.sqrt(kl_bound(n)) for n in points] if method == "best-of-n" else points) * 1.0
    shape = distance if method == "best-of-n" else np.log(np.maximum(distance, 1e-9))
    draws = np.random.default_rng(0)
    gold = distance * (alpha - beta * shape) + draws.normal(0, 0.1, (2, 30, len(points)))
    kl = np.broadcast_to(distance**2, gold.shape)
    return Optimized.of(method, Course(points, kl, gold + distance, gold))  # pyright: ignore[reportArgumentType]


def test_where_to_stop_is_the_last_point_before_the_peak():
    falls, rises = optimized("rl", 1.0, 0.5), optimized("rl", 1.0, 0.1)
    peak = math.exp(1.0 / 0.5 - 1)
    assert falls.fit is not None
    assert falls.fit.peak.value == pytest.approx(peak, rel=0.05)
    assert falls.stop is not None
    assert falls.course.points[falls.stop] == 2
    lost = 2 * (1 - 0.5 * math.log(2)) - 12 * (1 - 0.5 * math.log(12))
    assert falls.lost is not None
    assert falls.lost.low < lost < falls.lost.high
    assert f"stop at step 2; optimizing further costs {falls.lost.value:.2f}" in falls.said()
    assert falls.to_json()["stop"]["kl"] == pytest.approx(peak**2, rel=0.1)
    assert falls.to_json()["stop"]["at"] == 2
    assert rises.stop is None
    assert rises.lost is None
    assert "no peak up to" in rises.to_json()["stop"]["said"]
    assert len(falls.to_json()["fit_by_seed"]) == 2


@pytest.fixture
def results() -> list[Result]:
    return [
        Result(Proxy(m, 10 * m, 0.2), [0.6, None], optimized("best-of-n", 1.0, 0.3), ppo, diverged)
        for m, ppo, diverged in ((1, optimized("rl", 1.0, 0.5), []), (4, None, [0, 1]))
    ]


def test_the_table_says_where_gold_is_highest(results):
    screen = Console(width=110, record=True, file=io.StringIO())
    screen.print(table(results))
    lines = [" ".join(line.split()) for line in screen.export_text().splitlines()]
    assert any(line.startswith("10 20% 60% best of n 2.5") for line in lines)
    (falls,) = [line for line in lines if line.startswith("ppo 144.0")]
    assert "100% step 2" in falls
    assert "ppo diverged" in lines


def test_results_are_json_and_a_picture(results, tmp_path):
    pytest.importorskip("matplotlib")
    plain = json.loads(json.dumps([one.to_json() for one in results], allow_nan=False))
    assert [one["labels"] for one in plain] == [10, 40]
    assert plain[1]["ppo"] is None
    assert plain[0]["ppo"]["points"][2]["kl"]["value"] == pytest.approx(16.0)
    (path,) = draw(results, tmp_path)
    assert path.name == "overopt-noise-0.2.png"
    assert path.stat().st_size > 10_000
