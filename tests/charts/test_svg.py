"""Charts as SVG: where values are drawn, what is named, and that texts stay text."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest

from rlhf_cli.charts.chart import Chart, Mark, Series, ticks
from rlhf_cli.charts.svg import svg


def drawn(*series: Series, **options) -> ElementTree.Element:
    return ElementTree.fromstring(svg(Chart("a title", "", series, x="step", y="reward", **options)))


def texts(picture: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [one for one in picture.iter("text") if one.get("class", "").split()[0] == name]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.3, 10.2, [2.0, 4.0, 6.0, 8.0, 10.0]),
        (-0.01, 0.011, [-0.01, -0.005, 0.0, 0.005, 0.01]),
        (1990.0, 2010.0, [1990.0, 1995.0, 2000.0, 2005.0, 2010.0]),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        pytest.param(1.0, 14.0, [5.0, 10.0], id="a step of 2.5 would fit best"),
        pytest.param(1.0, 3.0, [1.0, 2.0, 3.0], id="so would one of 0.5"),
        pytest.param(0.0, 150.0, [0.0, 25.0, 50.0, 75.0, 100.0, 125.0, 150.0], id="25 is whole"),
    ],
)
def test_ticks_of_a_count_are_whole_numbers(low, high, expected):
    assert ticks(low, high, 6, is_whole=True) == expected


def test_a_line_goes_where_the_values_are():
    picture = drawn(Series("one", [(0, 0.0), (10, 1.0)]))
    (line,) = [path for path in picture.iter("path") if path.get("class") == "line c0"]
    (x1, y1), (x2, y2) = [tuple(map(float, pair.split())) for pair in line.get("d")[1:].split("L")]
    assert (x1, x2 > x1, y2 < y1) == (58.0, True, True), "y grows upward"
    heights = {text.text: float(text.get("y")) for text in texts(picture, "tick")}
    zero, one = heights["0.00"], heights["1.00"]
    assert (y1, y2) == pytest.approx((zero - 4, one - 4), abs=0.1)


def test_a_single_point_is_a_dot_and_a_series_without_points_is_not_drawn():
    picture = drawn(Series("", [(3, 2.0)]), Series("absent", []))
    assert len(list(picture.iter("circle"))) == 1
    assert texts(picture, "name") == []


def test_equal_values_have_an_axis():
    assert texts(drawn(Series("", [(1, 5.0), (2, 5.0)])), "tick")


def test_names_at_the_ends_do_not_overlap():
    many = [Series(f"series {number}", [(0, 0.0), (1, 0.001 * number)], number % 5) for number in range(8)]
    heights = sorted(float(text.get("y")) for text in texts(drawn(*many), "name"))
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 12.9
    assert heights[-1] <= 280 - 40 + 1


def test_marks_and_intervals_are_within_the_axes():
    series = Series("", [(0, 1.0), (4, 2.0)], kind="both", intervals=[(0, 0.0, 3.0)])
    picture = drawn(series, marks=[Mark(0.5, "chance"), Mark(99, "far")])
    assert [text.text for text in texts(picture, "note")] == ["chance"]
    for path in picture.iter("path"):
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", path.get("d"))]
        assert all(0 <= number <= 560 for number in numbers)


def test_a_band_is_one_area_within_the_axes():
    picture = drawn(Series("", [(0, 1.0), (4, 2.0)], band=[(0, -3.0, 5.0), (4, 1.0, 3.0)]))
    (area,) = [path.get("d") for path in picture.iter("path") if path.get("class") == "band c0"]
    heights = [float(pair.split()[1]) for pair in area[1:-1].split("L")]
    assert area.endswith("Z")
    assert heights == sorted(heights[:2]) + sorted(heights[2:], reverse=False)
    assert 12 <= min(heights) < max(heights) <= 240


def test_categories_are_named_in_place_of_numbers():
    picture = drawn(Series("", [(0.0, 1.0), (1.0, 2.0)], kind="dots"), x_names=["all pairs", "longer"])
    named = [text.text for text in texts(picture, "tick") if text.get("text-anchor") == "middle"]
    assert named == ["all pairs", "longer"]


def test_names_are_escaped():
    hostile = Chart('"><b>', "", [Series("<script>alert(1)</script>", [(0, 1.0)])], x="<x>", y="&")
    assert "<script>" not in svg(hostile)
    assert "<b>" not in svg(hostile)
    ElementTree.fromstring(svg(hostile))
