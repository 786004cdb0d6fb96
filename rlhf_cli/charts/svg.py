"""Charts as inline SVG: no library, no script, and colors by CSS class, so that they follow light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from rlhf_cli.charts.chart import Chart, Mark, Point, Series

_WIDTH, _HEIGHT = 560, 280
_LEFT, _TOP, _BOTTOM = 58, 12, 40
_CHARACTER = 6.4
"""Width of a character of a label, in the units of the picture."""
_LINE = 13.0
"""Height of a label."""


@dataclass(frozen=True)
class _Frame:
    """Maps values to the picture."""

    chart: Chart
    right: float

    def at_x(self, value: float) -> float:
        low, high = self.chart.x_span
        return _LEFT + (value - low) / (high - low) * (self.right - _LEFT)

    def at_y(self, value: float) -> float:
        low, high = self.chart.y_span
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)


def svg(chart: Chart) -> str:
    """Return a chart as one `<svg>` element, without its title and caption, which are the page's."""
    longest = max(len(one.name) for one in chart.drawn)
    frame = _Frame(chart, _WIDTH - max(14.0, min(190.0, longest * _CHARACTER + 12)))
    parts = [*_axes(frame)]
    if chart.diagonal:
        low, high = chart.diagonal_ends
        parts.append(_path([(low, low), (high, high)], frame, "mark"))
    parts += [part for mark in chart.seen_marks for part in _mark(mark, frame)]
    parts += [part for one in chart.drawn for part in _band(one, frame)]
    parts += [part for one in chart.drawn for part in _series(one, frame)]
    inside = _HEIGHT - _BOTTOM - _TOP
    for one, share in chart.names(_LINE / inside):
        parts.append(_text(frame.right + 6, _TOP + inside * (1 - share) + 4, one.name, f"name c{one.color}", "start"))
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(chart.spoken)}">'
        f"<title>{escape(chart.spoken)}</title>{''.join(parts)}</svg>"
    )


def _axes(frame: _Frame) -> Iterator[str]:
    bottom, chart = _HEIGHT - _BOTTOM, frame.chart
    for value, name in chart.y_ticks:
        height = frame.at_y(value)
        yield f'<line class="grid" x1="{_LEFT}" y1="{height:.1f}" x2="{frame.right:.1f}" y2="{height:.1f}"/>'
        yield _text(_LEFT - 6, height + 4, name, "tick", "end")
    for value, name in chart.x_ticks:
        left = frame.at_x(value)
        yield f'<line class="axis" x1="{left:.1f}" y1="{bottom}" x2="{left:.1f}" y2="{bottom + 4}"/>'
        yield _text(left, bottom + 16, name, "tick", "middle")
    yield f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{frame.right:.1f}" y2="{bottom}"/>'
    yield _text((_LEFT + frame.right) / 2, _HEIGHT - 6, chart.x, "label", "middle")
    turned = f'transform="translate(11 {(_TOP + bottom) / 2}) rotate(-90)"'
    yield f'<text class="label" text-anchor="middle" {turned}>{escape(chart.y)}</text>'


def _band(one: Series, frame: _Frame) -> Iterator[str]:
    if one.band:
        upper = [(x, high) for x, _, high in one.band]
        lower = [(x, low) for x, low, _ in reversed(one.band)]
        yield f'<path class="band c{one.color}" d="{_points([*upper, *lower], frame)}Z"/>'


def _series(one: Series, frame: _Frame) -> Iterator[str]:
    name = f"c{one.color}"
    for x, low, high in one.intervals:
        left, top, bottom = frame.at_x(x), frame.at_y(high), frame.at_y(low)
        yield f'<path class="bar {name}" d="M{left:.1f} {top:.1f}V{bottom:.1f}"/>'
    if one.kind != "dots" and len(one.points) > 1:
        yield _path(one.points, frame, f"line {name}")
    if one.kind != "line" or len(one.points) == 1:
        for x, y in one.points:
            yield f'<circle class="dot {name}" cx="{frame.at_x(x):.1f}" cy="{frame.at_y(y):.1f}" r="3.2"/>'


def _mark(mark: Mark, frame: _Frame) -> list[str]:
    height = frame.at_y(mark.value)
    line = f'<path class="mark" d="M{_LEFT} {height:.1f}H{frame.right:.1f}"/>'
    return [line, _text(frame.right - 4, height - 4, mark.label, "note", "end")]


def _path(points: Sequence[Point], frame: _Frame, name: str) -> str:
    return f'<path class="{name}" d="{_points(points, frame)}"/>'


def _points(points: Sequence[Point], frame: _Frame) -> str:
    return "M" + "L".join(f"{frame.at_x(x):.1f} {frame.at_y(y):.1f}" for x, y in points)


def _text(x: float, y: float, text: str, name: str, anchor: str) -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
