"""A chart as plain values, which `svg` and `png` draw alike: the same axes, numbers, names and colors.

Series are named at their ends in place of a legend, which would hide data. Colors are near those of Okabe and Ito 2008,
which people with any color vision can tell apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Point = tuple[float, float]
Interval = tuple[float, float, float]
"""(x, low, high)."""
Span = tuple[float, float]
"""Low and high end of an axis."""

_MARGIN = 0.06
"""Free space above and below the values, as a share of their range."""


@dataclass(frozen=True)
class Series:
    """A series of points.

    Attributes:
        name: shown at its end; "" shows none.
        points: (x, y), x rising.
        color: number of the color, or "muted".
        kind: joined by a line, single dots, or dots that a line joins.
        intervals: of points, drawn as error bars.
        band: drawn as an area behind all series.
    """

    name: str
    points: Sequence[Point]
    color: int | Literal["muted"] = 0
    kind: Literal["line", "dots", "both"] = "line"
    intervals: Sequence[Interval] = field(default=())
    band: Sequence[Interval] = field(default=())


@dataclass(frozen=True)
class Mark:
    """A dashed line across the chart at a height, with a label for what it stands for."""

    value: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A chart with its title and caption.

    Attributes:
        title: what is seen, above the chart.
        caption: figures and how to read it, below the title.
        series: at least one with points; those without are not drawn.
        x: name of the horizontal axis, with its unit.
        y: name of the vertical axis, with its unit.
        subject: what the chart is about, in front of the title for people who hear it and in the name of its file.
        marks: lines across the chart.
        shows: values that the vertical axis includes in any case.
        diagonal: draw the line y = x.
        has_whole_x: x counts something, so that only whole numbers are named.
        x_names: names of x = 0, 1, 2, ... in place of numbers.
    """

    title: str
    caption: str
    series: Sequence[Series]
    x: str
    y: str
    subject: str = ""
    marks: Sequence[Mark] = ()
    shows: Sequence[float] = ()
    diagonal: bool = False
    has_whole_x: bool = False
    x_names: Sequence[str] = ()

    @property
    def drawn(self) -> list[Series]:
        """Series that have points."""
        return [one for one in self.series if one.points]

    @property
    def spoken(self) -> str:
        """Title for people who hear the page."""
        return f"{self.subject}: {self.title}" if self.subject else self.title

    @property
    def file_name(self) -> str:
        """Name of the chart's file, without suffix."""
        return re.sub(r"[^a-z0-9]+", "-", self.spoken.replace("√", "root ").lower()).strip("-")

    @property
    def x_span(self) -> Span:
        """Ends of the horizontal axis."""
        if self.x_names:
            return -0.5, len(self.x_names) - 0.5
        return _span([x for one in self.drawn for x, _ in one.points], 0.0)

    @property
    def y_span(self) -> Span:
        """Ends of the vertical axis."""
        heights = [y for one in self.drawn for _, y in one.points] + list(self.shows)
        heights += [end for one in self.drawn for _, *ends in (*one.intervals, *one.band) for end in ends]
        return _span(heights, _MARGIN)

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """(value, text) along the horizontal axis."""
        if self.x_names:
            return [(float(number), name) for number, name in enumerate(self.x_names)]
        return _named(ticks(*self.x_span, 6, is_whole=self.has_whole_x))

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """(value, text) along the vertical axis."""
        return _named(ticks(*self.y_span))

    @property
    def seen_marks(self) -> list[Mark]:
        """Marks within the vertical axis."""
        low, high = self.y_span
        return [mark for mark in self.marks if low < mark.value < high]

    @property
    def diagonal_ends(self) -> Span:
        """Where the line y = x begins and ends within both axes."""
        return max(self.x_span[0], self.y_span[0]), min(self.x_span[1], self.y_span[1])

    def names(self, line: float) -> list[tuple[Series, float]]:
        """Return (series, height of its name), moved apart where names would overlap.

        Args:
            line: height of a name.

        Both heights are shares of the vertical axis, 0 at its lower end.
        """
        low, high = self.y_span
        named = sorted(
            ((one, (one.points[-1][1] - low) / (high - low)) for one in self.drawn if one.name), key=lambda one: -one[1]
        )
        heights: list[float] = []
        for _, height in named:
            heights.append(height if not heights else min(height, heights[-1] - line))
        under = max(0.0, -heights[-1]) if heights else 0.0
        return [(one, height + under) for (one, _), height in zip(named, heights, strict=True)]


def ticks(low: float, high: float, count: int = 5, *, is_whole: bool = False) -> list[float]:
    """Return about `count` round numbers between two values, both ends where they are round.

    Args:
        low: smaller value.
        high: larger value.
        count: at most about so many.
        is_whole: return whole numbers only.
    """
    step = _round_step((high - low) / max(1, count), is_whole=is_whole)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _round_step(size: float, *, is_whole: bool) -> float:
    power = 10.0 ** math.floor(math.log10(max(size, 1.0) if is_whole else size))
    steps = (power * factor for factor in (1, 2, 2.5, 5, 10))
    return next(step for step in steps if step >= size * (1 - 1e-9) and not (is_whole and step % 1))


def _span(values: Sequence[float], margin: float) -> Span:
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(low)):
        size = max(abs(low) * 0.1, 0.5)
        return low - size, high + size
    return low - margin * (high - low), high + margin * (high - low)


def _named(values: Sequence[float]) -> list[tuple[float, str]]:
    return [(value, _number(value, values)) for value in values]


def _number(value: float, among: Sequence[float]) -> str:
    step = abs(among[1] - among[0]) if len(among) > 1 else max(abs(value), 1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else (1 if step % 1 else 0)
    decimals += int(round(step * 10**decimals, 6) % 1 > 0)
    return f"{0.0 if abs(value) < 1e-12 else value:,.{decimals}f}"
