"""Charts of a report as inline SVG: no library, no script, and colors by CSS class, so that they follow light and dark.

Series are named at their ends in left of a legend, which would hide data. Colors are near those of Okabe and Ito 2008,
which people with any color vision can tell apart; the style sheet of the page defines them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

_WIDTH, _HEIGHT = 560, 280
_LEFT, _TOP, _BOTTOM = 58, 12, 40
_CHARACTER = 6.4
"""Width of a character of a label, in the units of the picture."""
_LINE = 13.0
"""Height of a label."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A series of points.

    Attributes:
        name: shown at its end; "" shows none.
        points: (x, y), x rising.
        color: number of the color, or "muted".
        kind: joined by a line, single dots, or dots that a line joins.
        intervals: (x, low, high) of points, drawn as error bars.
    """

    name: str
    points: Sequence[Point]
    color: int | Literal["muted"] = 0
    kind: Literal["line", "dots", "both"] = "line"
    intervals: Sequence[tuple[float, float, float]] = field(default=())


@dataclass(frozen=True)
class Mark:
    """A dashed line across the chart at a height, with a label for what it stands for."""

    value: float
    label: str


@dataclass(frozen=True)
class _Frame:
    """Maps values to the picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    right: float

    def at_x(self, value: float) -> float:
        return _LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - _LEFT)

    def at_y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (_HEIGHT - _BOTTOM - _TOP)


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x: str,
    y: str,
    marks: Sequence[Mark] = (),
    shows: Sequence[float] = (),
    diagonal: bool = False,
    has_whole_x: bool = False,
) -> str:
    """Return a chart as one `<svg>` element; "" without any point.

    Args:
        series: those without points are omitted.
        title: what is seen, for people who hear the page; it is not drawn.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis, with its unit.
        marks: lines across the chart.
        shows: values that the vertical axis includes in any case.
        diagonal: draw the line y = x.
        has_whole_x: x counts something, so that only whole numbers are named.
    """
    series = [one for one in series if one.points]
    if not series:
        return ""
    longest = max((len(one.name) for one in series), default=0)
    frame = _frame(series, shows, _WIDTH - max(14.0, min(190.0, longest * _CHARACTER + 12)))
    parts = _axes(frame, x, y, least=1.0 if has_whole_x else 0.0)
    if diagonal:
        low, high = max(frame.x[0], frame.y[0]), min(frame.x[1], frame.y[1])
        parts.append(_path([(low, low), (high, high)], frame, "mark"))
    parts += [part for mark in marks for part in _mark(mark, frame)]
    parts += [part for one in series for part in _series(one, frame)]
    parts += _labels(series, frame)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def ticks(low: float, high: float, count: int = 5, *, least: float = 0.0) -> list[float]:
    """Return about `count` round numbers between two values, at least `least` apart; both ends where they are round."""
    step = _round_step(max(least, (high - low) / max(1, count)))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _round_step(size: float) -> float:
    power = 10.0 ** math.floor(math.log10(size))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= size * (1 - 1e-9))


def _frame(series: Sequence[Series], shows: Sequence[float], right: float) -> _Frame:
    xs = [px for one in series for px, _ in one.points]
    ys = [py for one in series for _, py in one.points] + list(shows)
    ys += [end for one in series for _, low, high in one.intervals for end in (low, high)]
    return _Frame(_range(xs, 0.0), _range(ys, 0.06), right)


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(low)):
        size = max(abs(low) * 0.1, 0.5)
        return low - size, high + size
    return low - margin * (high - low), high + margin * (high - low)


def _axes(frame: _Frame, x: str, y: str, *, least: float) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    vertical, horizontal = ticks(*frame.y), ticks(*frame.x, 6, least=least)
    for value in vertical:
        height = frame.at_y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{height:.1f}" x2="{frame.right:.1f}" y2="{height:.1f}"/>')
        parts.append(_text(_LEFT - 6, height + 4, _number(value, vertical), "tick", "end"))
    for value in horizontal:
        left = frame.at_x(value)
        parts.append(f'<line class="axis" x1="{left:.1f}" y1="{bottom}" x2="{left:.1f}" y2="{bottom + 4}"/>')
        parts.append(_text(left, bottom + 16, _number(value, horizontal), "tick", "middle"))
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{frame.right:.1f}" y2="{bottom}"/>')
    parts.append(_text((_LEFT + frame.right) / 2, _HEIGHT - 6, x, "label", "middle"))
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="label" text-anchor="middle" transform="translate(11 {middle}) rotate(-90)">{escape(y)}</text>'
    )
    return parts


def _number(value: float, among: Sequence[float]) -> str:
    step = abs(among[1] - among[0]) if len(among) > 1 else max(abs(value), 1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else (1 if step % 1 else 0)
    decimals += int(round(step * 10**decimals, 6) % 1 > 0)
    return f"{0.0 if abs(value) < 1e-12 else value:,.{decimals}f}"


def _series(one: Series, frame: _Frame) -> list[str]:
    name = f"c{one.color}"
    parts = []
    for px, low, high in one.intervals:
        left, top, bottom = frame.at_x(px), frame.at_y(high), frame.at_y(low)
        parts.append(f'<path class="bar {name}" d="M{left:.1f} {top:.1f}V{bottom:.1f}"/>')
    if one.kind != "dots" and len(one.points) > 1:
        parts.append(_path(one.points, frame, f"line {name}"))
    if one.kind != "line" or len(one.points) == 1:
        parts += [
            f'<circle class="dot {name}" cx="{frame.at_x(px):.1f}" cy="{frame.at_y(py):.1f}" r="3.2"/>'
            for px, py in one.points
        ]
    return parts


def _labels(series: Sequence[Series], frame: _Frame) -> list[str]:
    """Name the series at their ends, moved apart where they would overlap."""
    named = sorted((one for one in series if one.name), key=lambda one: frame.at_y(one.points[-1][1]))
    heights: list[float] = []
    for one in named:
        height = frame.at_y(one.points[-1][1]) + 4
        heights.append(height if not heights else max(height, heights[-1] + _LINE))
    over = (heights[-1] - (_HEIGHT - _BOTTOM)) if heights else 0.0
    if over > 0:
        heights = [height - over for height in heights]
    return [
        _text(frame.right + 6, height, one.name, f"name c{one.color}", "start")
        for one, height in zip(named, heights, strict=True)
    ]


def _mark(mark: Mark, frame: _Frame) -> list[str]:
    if not frame.y[0] < mark.value < frame.y[1]:
        return []
    height = frame.at_y(mark.value)
    line = f'<path class="mark" d="M{_LEFT} {height:.1f}H{frame.right:.1f}"/>'
    return [line, _text(frame.right - 4, height - 4, mark.label, "note", "end")]


def _path(points: Sequence[Point], frame: _Frame, name: str) -> str:
    return f'<path class="{name}" d="{_points(points, frame)}"/>'


def _points(points: Sequence[Point], frame: _Frame) -> str:
    return "M" + "L".join(f"{frame.at_x(px):.1f} {frame.at_y(py):.1f}" for px, py in points)


def _text(x: float, y: float, text: str, name: str, anchor: str) -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
