"""Plots a label report as small multiples; needs matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.labeling.statistics.report import (
    ALWAYS_LONGER,
    SECONDS_PER_LABEL,
    USUAL_AGREEMENT,
    AnnotatorReport,
    Estimate,
    LabelReport,
)
from rlhf_cli.labeling.warnings import one_line
from rlhf_cli.plotting import BLUE, GRAY, GREEN, ORANGE, PURPLE, new_picture, prepare, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAND = "#dbe7f1"
_LINES = (BLUE, ORANGE, GREEN, PURPLE, "#b3902d", "#4aa3b5", "#a8485a", GRAY)
_MOST_PEOPLE = 20
_LONGEST_NAME = 16
_EVERYBODY = "all annotators"
_LEGEND_SPACE = 36.0
"""Space between axes and title for two rows of names, in points."""

_Row = tuple[str, Estimate]


def draw_report(report: LabelReport, path: Path, *, title: str) -> None:
    """Plot agreement, biases, pace and distributions.

    Args:
        report: to plot.
        path: of the picture; its suffix determines the format.
        title: above it.

    Raises:
        OSError: the file cannot be written.
    """
    people = sorted(report.annotators, key=lambda person: (-person.labels, person.name))[:_MOST_PEOPLE]
    people.sort(key=lambda person: person.name)
    counts = report.counts
    shown = "" if len(people) == len(report.annotators) else f"; the {len(people)} annotators with most labels"
    count = len(report.annotators)
    heading = f"{one_line(title)}: {counts.ordinary:,} labels, {counts.items:,} items, {count} annotators{shown}"
    picture = new_picture(13.5, 6.2 + 0.24 * max(0, len(people) - 4), heading)
    picture.get_layout_engine().set(w_pad=0.12, h_pad=0.10)  # type: ignore[union-attr]
    (agreement, consistency, biases), (pace, positions, tiers) = picture.subplots(
        2, 3, height_ratios=[1 + 0.09 * max(0, len(people) - 4), 1]
    )
    _agreement(agreement, report, people)
    _consistency(consistency, report, people, with_names=not agreement.get_yticks().size)
    _biases(biases, report, people, with_names=not (agreement.get_yticks().size or consistency.get_yticks().size))
    _pace(pace, people)
    _positions(positions, report)
    _tiers(tiers, report)
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; do not warn about it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        save(picture, path)


def _agreement(axes: Axes, report: LabelReport, people: Sequence[AnnotatorReport]) -> None:
    untied = _rows(report.agreement.without_ties, people, lambda person: person.agreement_untied)
    tied = _rows(report.agreement.with_ties, people, lambda person: person.agreement)
    if _frame(axes, "agreement with others", "share of pairs of completions", untied + tied, with_names=True):
        axes.axvspan(*USUAL_AGREEMENT, color=_BAND, linewidth=0, zorder=0, label="published, 63-77%")
        _dots(axes, untied, BLUE, "o", "ties excluded", shift=-0.13)
        _dots(axes, tied, ORANGE, "s", "ties included", shift=0.13)
        _legend(axes, columns=3)


def _consistency(axes: Axes, report: LabelReport, people: Sequence[AnnotatorReport], *, with_names: bool) -> None:
    own = _rows(report.self_consistency, people, lambda person: person.self_consistency)
    gold = _rows(report.gold, people, lambda person: person.gold)
    if _frame(axes, "self-consistency and gold", "share of pairs of completions", own + gold, with_names=with_names):
        _dots(axes, own, BLUE, "o", "self-consistency", shift=-0.13)
        _dots(axes, gold, GREEN, "D", "gold accuracy", shift=0.13)
        _legend(axes)


def _biases(axes: Axes, report: LabelReport, people: Sequence[AnnotatorReport], *, with_names: bool) -> None:
    first = _rows(report.first_shown, people, lambda person: person.first_shown)
    longer = _rows(report.longer, people, lambda person: person.longer)
    if _frame(axes, "biases", "share of untied pairs", first + longer, with_names=with_names):
        axes.axvline(0.5, color=GRAY, linewidth=1.0, label="no position bias")
        axes.axvline(ALWAYS_LONGER, color=ORANGE, linewidth=1.0, linestyle=":", label="longer wins at AlpacaEval")
        _dots(axes, first, BLUE, "o", "earlier shown wins", shift=-0.13)
        _dots(axes, longer, ORANGE, "s", "longer wins", shift=0.13)
        _legend(axes)


def _rows(
    everybody: Estimate, people: Sequence[AnnotatorReport], figure: Callable[[AnnotatorReport], Estimate]
) -> list[_Row]:
    return [(_EVERYBODY, everybody), *((_name(person), figure(person)) for person in people)]


def _frame(axes: Axes, title: str, unit: str, rows: Sequence[_Row], *, with_names: bool) -> bool:
    """Axes of one row a person, of two figures each; whether there is anything to draw in them."""
    count = len(rows) // 2
    _style(axes, title)
    known = [figure for _, figure in rows if figure.value is not None]
    if not known:
        _nothing(axes)
        return False
    from matplotlib.ticker import PercentFormatter

    ends = [end for figure in known for end in (figure.value, figure.low, figure.high) if end is not None]
    low, high = min(*ends, 0.45), max(*ends, 0.80)
    axes.set_xlim(max(-0.02, low - 0.03), min(1.02, high + 0.03))
    axes.set_ylim(count - 0.5, -0.5)
    names = [name for name, _ in rows[:count]] if with_names else []
    axes.set_yticks(range(count), names or [""] * count, parse_math=False)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.axhline(0.5, color=GRAY, linewidth=0.6, alpha=0.6)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(unit, fontsize=9)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    return True


def _dots(axes: Axes, rows: Sequence[_Row], color: str, marker: str, label: str, *, shift: float) -> None:
    values: list[float] = []
    positions: list[float] = []
    for position, (_, figure) in enumerate(rows):
        if figure.value is not None:
            values.append(figure.value)
            positions.append(position + shift)
            if figure.low is not None and figure.high is not None:
                ends = [figure.low, figure.high]
                axes.plot(ends, [position + shift] * 2, color=color, linewidth=1.6, alpha=0.55, zorder=2)
    if values:
        axes.plot(values, positions, marker, color=color, markersize=5, label=label, zorder=3)


def _pace(axes: Axes, people: Sequence[AnnotatorReport]) -> None:
    _style(axes, "pace")
    timed = [(person, person.pace) for person in people if person.pace is not None]
    if not timed:
        _nothing(axes)
        return
    few = len(timed) <= len(_LINES)
    for position, (person, pace) in enumerate(timed):
        labels, seconds = zip(*pace.course, strict=True)
        color = _LINES[position] if few else GRAY
        axes.plot(labels, seconds, color=color, linewidth=1.5, alpha=0.9 if few else 0.35, marker=".", markersize=4,
                  label=_name(person) if few else None)  # fmt: skip
    axes.axhline(SECONDS_PER_LABEL, color=GRAY, linewidth=0.9, linestyle="--", label="AlpacaEval")
    low, high = axes.get_ylim()
    if high > 8 * max(low, 0.1) and min(second for _, pace in timed for _, second in pace.course) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(0, high)
    axes.set_xlabel("labels given", fontsize=9)
    axes.set_ylabel("seconds per label (median)", fontsize=9)
    axes.grid(alpha=0.25, linewidth=0.6)
    _legend(axes, columns=5 if len(timed) > 5 else 3)


def _positions(axes: Axes, report: LabelReport) -> None:
    _style(axes, "position of the best completion")
    if not report.distribution.winners:
        _nothing(axes)
        return
    from matplotlib.ticker import PercentFormatter

    size = max(report.distribution.winners, key=lambda size: report.distribution.completions.get(size, 0))
    shares = report.distribution.winners[size]
    bars = axes.bar(range(size), shares, color=BLUE, width=0.62)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axes.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize=8, padding=3, bbox=behind, zorder=4)
    axes.axhline(1 / size, color=ORANGE, linewidth=1.2, linestyle="--", label="expected in random order", zorder=3)
    axes.set_ylim(0, max(*shares, 1 / size) * 1.3)
    axes.set_xticks(range(size), [str(position + 1) for position in range(size)])
    axes.set_xlabel(f"position shown, of {size} completions", fontsize=9)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(axes)


def _tiers(axes: Axes, report: LabelReport) -> None:
    _style(axes, "tiers per label")
    found = report.distribution.tiers
    if not found:
        _nothing(axes)
        return
    from matplotlib.ticker import PercentFormatter

    total, names = sum(found.values()), list(found)
    bars = axes.bar(range(len(names)), [times / total for times in found.values()], color=GREEN, width=0.62)
    axes.bar_label(bars, [f"{times:,}" for times in found.values()], fontsize=8, padding=2)
    axes.set_ylim(0, max(found.values()) / total * 1.2)
    axes.set_xlim(-0.8, max(len(names), 3) - 0.2)
    axes.set_xticks(range(len(names)), [str(name) for name in names])
    ties = "" if report.tie_share is None else f"; {report.tie_share:.1%} of pairs are ties"
    axes.set_xlabel(f"tiers, 1 is all tied{ties}", fontsize=9)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _style(axes: Axes, title: str) -> None:
    prepare(axes, title, pad=_LEGEND_SPACE)
    axes.grid(visible=False)


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", va="center", color=GRAY)
    axes.set_xticks([])
    axes.set_yticks([])


def _legend(axes: Axes, columns: int = 2) -> None:
    """Between title and axes, so that it hides nothing."""
    handles, names = axes.get_legend_handles_labels()
    legend = axes.legend(
        handles, names, loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=columns, fontsize=8, frameon=False,
        columnspacing=1.2, handletextpad=0.5, borderaxespad=0.0, labelspacing=0.3,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def _name(person: AnnotatorReport) -> str:
    name = one_line(person.name)
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
