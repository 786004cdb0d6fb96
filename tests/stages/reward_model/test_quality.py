"""What is written and said about a reward model's quality."""

from __future__ import annotations

import json

import pytest

from rlhf_cli.data.records import Ranking
from rlhf_cli.stages.reward_model import quality_plot
from rlhf_cli.stages.reward_model.evaluation import RankingReport, ranking_report
from rlhf_cli.stages.reward_model.quality import quality_summary, verdict, write_quality


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


def test_without_matplotlib_there_is_no_picture_and_a_line_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality_plot, "has_matplotlib", lambda: False)
    write_quality(report_of(3, 4), tmp_path)
    assert not (tmp_path / "quality.png").exists()
    assert "no quality.png: matplotlib is not installed" in capsys.readouterr().err
