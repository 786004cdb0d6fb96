"""A picture of a reward model's quality on held-out pairs, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli.plotting import has_matplotlib, new_picture, save
from rlhf_cli.progress import say
from rlhf_cli.stages.reward_model.evaluation import RankingReport
from rlhf_cli.stages.reward_model.quality_charts import quality_charts


def draw_quality(report: RankingReport, path: Path, *, title: str) -> bool:
    """Draw the charts of `quality_charts` side by side.

    Args:
        report: to draw.
        path: of the PNG file.
        title: of the picture.

    Returns:
        Whether it was drawn: not without matplotlib, which a message says.
    """
    if not has_matplotlib():
        say(f"no {path.name}: matplotlib is not installed (`pip install 'rlhf-cli[plots]'`)")
        return False
    from rlhf_cli.charts.png import draw

    charts = quality_charts(report.to_json())
    pairs = f"{report.accuracy.count:,} pairs of {report.accuracy.prompts:,} held-out prompts"
    picture = new_picture(4.6 * len(charts), 3.8, f"{title}: {pairs}")
    for axes, chart in zip(picture.subplots(1, len(charts), squeeze=False).flat, charts, strict=True):
        draw(axes, chart, title=chart.title)
    save(picture, path)
    return True
