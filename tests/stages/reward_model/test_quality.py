"""What is written and said about a reward model's quality."""

from __future__ import annotations

import json

import pytest

from rlhf_cli.data.records import Ranking
from rlhf_cli.stages.reward_model import quality_plot
from rlhf_cli.stages.reward_model.evaluation import RankingReport, ranking_report
from rlhf_cli.stages.reward_model.quality import quality_summary, verdict, write_quality
from rlhf_cli.stages.reward_model.quality_charts import quality_charts


def report_of(right: int, prompts: int) -> RankingReport:
    rankings = [Ranking(f"p{number}", ("better", "worse!"), ((0,), (1,))) for number in range(prompts)]
    return ranking_report(rankings, [[float(number < right), 0.5] for number in range(prompts)])


@pytest.mark.parametrize(
    ("right", "prompts", "expected"),
    [
        (30, 30, "better than chance"),
        (0, 30, "below chance"),
        (6, 12, "too few prompts"),
        (100, 200, "no better than chance"),
    ],
)
def test_the_verdict_is_in_the_file_and_a_bad_one_in_the_summary(right, prompts, expected, tmp_path):
    report = report_of(right, prompts)
    write_quality(report, tmp_path)
    written = json.loads((tmp_path / "quality.json").read_text())
    assert written["verdict"] == verdict(report) == expected
    assert (written["warning"] is None) == (expected == "better than chance")
    rows = dict(quality_summary(report, 0.7))
    assert rows.get("verdict") == (None if expected == "better than chance" else expected)


@pytest.mark.usefixtures("pictures")
def test_a_picture_is_drawn_beside_it(tmp_path):
    write_quality(report_of(30, 30), tmp_path)
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("pictures")
def test_without_matplotlib_there_is_no_picture_and_a_line_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality_plot, "has_matplotlib", lambda: False)
    write_quality(report_of(3, 4), tmp_path)
    assert not (tmp_path / "quality.png").exists()
    assert "no quality.png: matplotlib is not installed" in capsys.readouterr().err


def test_the_charts_show_what_the_file_holds():
    rankings = [Ranking(f"p{number}", ("better", "much worse"), ((0,), (1,))) for number in range(30)]
    report = ranking_report(rankings, [[float(number < 20), 0.5] for number in range(30)])
    reliability, margins, lengths = quality_charts(json.loads(json.dumps(report.to_json())))
    (points,) = [one.points for one in reliability.series]
    assert points == [(one.mean, one.accuracy.value) for one in report.reliability]
    assert "Calibration error: " in reliability.caption
    assert margins.x == "difference of the two rewards", "all pairs are one tier apart"
    assert lengths.x_names == ["all pairs", "shorter chosen", "always the longer"]
    assert [one.points[0][1] for one in lengths.series] == [2 / 3, 2 / 3, 0.0]
    assert lengths.series[0].intervals == [(0.0, report.accuracy.low, report.accuracy.high)]
    assert quality_charts({}) == []
