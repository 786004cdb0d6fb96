"""The picture of a run's curves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_cli import report
from rlhf_cli.plotting import BLUE, GRAY, GREEN, MUTED, ORANGE, PURPLE
from rlhf_cli.training.monitoring import plots
from rlhf_cli.training.monitoring.curves import Curve
from rlhf_cli.training.monitoring.metrics_log import read_rows

pytestmark = pytest.mark.usefixtures("pictures")

ROWS = read_rows(Path(__file__).with_name("quickstart_metrics.jsonl"))


def test_a_picture_is_drawn_and_the_same_one_each_time(tmp_path):
    evaluated = [row | ({"eval/objective/scores": 0.5} if row["step"] % 10 == 0 else {}) for row in ROWS]
    rows = [{"step": 0, "eval/objective/kl": 0.0}, *evaluated]
    assert plots.draw_curves(rows, tmp_path / "a.png", title="a $100_000 run [x]")
    assert plots.draw_curves(rows, tmp_path / "b.png", title="a $100_000 run [x]")
    picture = (tmp_path / "a.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert picture == (tmp_path / "b.png").read_bytes()


def test_a_metric_that_was_not_measured_has_no_plot(tmp_path):
    rows = [{"step": 1, "objective/scores": 0.5, "objective/scores_std": None, "objective/kl": None}]
    assert plots.draw_curves(rows, tmp_path / "a.png", title="one step")


def test_the_colors_are_those_of_the_report():
    style = (Path(report.__file__).parent / "assets" / "report.css").read_text()
    light = dict(re.findall(r"--(c\w+): (#\w+)", style[: style.index("@media")]))
    assert [light[f"c{number}"] for number in range(5)] == [BLUE, ORANGE, GREEN, PURPLE, GRAY]
    assert light["cmuted"] == MUTED


def test_no_steps_no_picture(tmp_path):
    assert not plots.draw_curves([], tmp_path / "a.png", title="nothing")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_it_is_said_and_nothing_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    assert not plots.draw_curves(ROWS, tmp_path / "curves.png", title="t")
    assert "no curves.png: matplotlib is not installed (`pip install 'rlhf-cli[plots]'`)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_running_mean_is_over_the_values_around():
    assert Curve((1, 2, 3, 4), (1.0, 2.0, 6.0, 3.0)).running_mean(3) == [1.5, 3.0, 11 / 3, 4.5]
    assert Curve((1, 2), (1.0, 2.0)).running_mean(1) == [1.0, 2.0]
