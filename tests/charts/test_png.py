"""Charts as PNG: the axes, names and colors of the SVG, from the same description."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from PIL import Image

from rlhf_cli.charts.chart import Chart, Mark, Series
from rlhf_cli.charts.png import COLORS, draw, write_png
from rlhf_cli.charts.svg import svg
from rlhf_cli.plotting import MUTED, new_picture

CHART = Chart(
    "Reward & $cost$",
    "mean of completions: 0.5 → 1.5. " + "Words that fill more than a line. " * 4,
    [
        Series("", [(1, 0.4), (2, 1.1), (3, 1.6)], "muted"),
        Series("run $_{x}^$", [(1, 0.5), (2, 1.0), (3, 1.5)], band=[(1, 0.0, 1.0), (3, 1.0, 2.0)]),
        Series("held out", [(1, 0.5), (3, 1.49)], 1, "both", intervals=[(3, 1.2, 1.8)]),
        Series("absent", []),
    ],
    x="step",
    y="reward",
    subject="ppo",
    marks=[Mark(0.7, "chance"), Mark(99.0, "far")],
    shows=(2.2,),
    has_whole_x=True,
)


@pytest.fixture
def axes():
    found = new_picture(5, 3, "").subplots()
    draw(found, CHART)
    return found


def test_the_axes_are_those_of_the_svg(axes):
    picture = ElementTree.fromstring(svg(CHART))
    named = [text.text for text in picture.iter("text") if text.get("class") == "tick"]
    labels = [one.get_text() for axis in (axes.yaxis, axes.xaxis) for one in axis.get_ticklabels()]
    assert labels == named
    assert (axes.get_xlim(), axes.get_ylim()) == (CHART.x_span, CHART.y_span)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "reward")


def test_series_have_their_colors_names_and_shapes(axes):
    assert [line.get_color() for line in axes.lines if len(line.get_xdata()) == 3] == [MUTED, COLORS[0]]
    assert {text.get_text(): text.get_color() for text in axes.texts if text.get_fontweight() == "bold"} == {
        "run $_{x}^$": COLORS[0], "held out": COLORS[1],
    }  # fmt: skip
    assert [text.get_text() for text in axes.texts if text.get_fontweight() != "bold"] == ["chance"]
    assert len(axes.collections) == 1, "the band"
    (bar,) = [line for line in axes.lines if list(line.get_xdata()) == [3, 3]]
    assert list(bar.get_ydata()) == [1.2, 1.8]


def test_names_do_not_overlap():
    heights = [share for _, share in CHART.names(0.07)]
    assert heights[0] - heights[1] >= 0.069
    low = Chart("", "", [Series(str(n), [(0, 0.0), (1, 0.0)]) for n in range(5)], x="", y="", shows=(0.0, 9.0))
    assert min(share for _, share in low.names(0.07)) >= 0.0


def test_a_file_is_the_same_each_time(tmp_path):
    for name in ("a.png", "b.png"):
        write_png(CHART, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (704, 396)


def test_a_file_is_named_by_subject_and_title():
    assert CHART.file_name == "ppo-reward-cost"
