"""Formats a label report for the terminal, without frames and readable in a pipe or an e-mail too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rlhf_cli.labeling.label_records import STRENGTHS
from rlhf_cli.labeling.statistics.descriptive import NO_GUIDELINES
from rlhf_cli.labeling.statistics.measures_text import measures_text
from rlhf_cli.labeling.statistics.report import (
    AnnotatorReport,
    Distribution,
    Estimate,
    LabelCounts,
    LabelReport,
    Pace,
)
from rlhf_cli.labeling.warnings import one_line, rendered

_MOST_PAIRS = 10
_LONGEST_NAME = 18
_NOTHING = "-"


def report_text(report: LabelReport) -> RenderableType:
    """The report, at most 80 columns wide; `--json` has the rest."""
    if not report.counts.ranked:
        return Group(
            *_counts(report), Text("no labels with a ranking yet, so there is nothing to measure"), *_warnings(report)
        )
    parts: list[RenderableType] = [*_counts(report), "", *measures_text(report)]
    if any(one.labels for one in report.annotators):
        parts += ["", *_annotators(report.annotators), "", *_habits(report.annotators)]
    if report.agreement.pairs:
        parts += ["", *_pairs(report)]
    parts += ["", _distribution(report)]
    if report.unknown:
        parts += ["", *(Text(f"unknown: {sentence}", style="dim") for sentence in report.unknown)]
    return Group(*parts, "", *_warnings(report), "", _next(report))


def _counts(report: LabelReport) -> Iterator[Text]:
    counts, people = report.counts, len(report.annotators)
    of = _many(counts.prompts, "prompt")
    of = of if counts.items == counts.prompts else f"{_many(counts.items, 'item')} of {of}"
    shared = f"{counts.shared_items:,} of them ranked by two or more" if counts.shared_items else "none ranked by two"
    yield Text(
        f"{_many(counts.ordinary, 'label')} by {people} {'annotator' if people == 1 else 'annotators'}: {of}, {shared}",
        style="bold",
    )
    rest = _rest(counts)
    if rest:
        yield Text("also: " + ", ".join(rest))
    if counts.reasons:
        most = sorted(counts.reasons.items(), key=lambda reason: (-reason[1], reason[0]))[:5]
        yield Text("reasons: " + ", ".join(f"{one_line(reason)} ({times:,})" for reason, times in most))
    told = {name: times for name, times in report.guidelines.items() if name != NO_GUIDELINES}
    if told:
        yield Text("guidelines: " + ", ".join(f"{name[:12]} ({times:,} labels)" for name, times in told.items()))


def _rest(counts: LabelCounts) -> list[str]:
    each = (
        (counts.repeats, "hidden repeat", "hidden repeats"),
        (counts.gold, "gold", "gold"),
        (counts.skipped, "skipped", "skipped"),
        (counts.flagged, "flagged", "flagged"),
        (counts.replaced, *("replaced by a later label of the same annotator",) * 2),
    )
    return [f"{count:,} {one if count == 1 else many}" for count, one, many in each if count]


def _annotators(people: Sequence[AnnotatorReport]) -> Iterator[RenderableType]:
    names = ("annotator", "labels", "skipped", "with others", "among others", "repeats", "gold")
    rows = [
        (
            f"{one.labels:,}",
            f"{one.skipped + one.flagged:,}",
            _short(one.agreement),
            _short(one.others),
            _short(one.self_consistency),
            _short(one.gold),
        )
        for one in people
    ]
    yield _by_annotator(names, people, rows)
    yield _caption(
        names,
        rows,
        {
            "with others": "the same verdict as another annotator",
            "among others": "the others with one another",
            "repeats": "self-consistency",
            "gold": "gold accuracy; ± is half a 95 % interval",
        },
    )


def _habits(people: Sequence[AnnotatorReport]) -> Iterator[RenderableType]:
    names = ("annotator", "earlier wins", "longer wins", "ties", "time", "per hour", "too fast")
    rows = [
        (
            _short(one.first_shown),
            _short(one.longer),
            _NOTHING if one.tie_share is None else f"{one.tie_share:.0%}",
            *_pace(one.pace),
        )
        for one in people
    ]
    yield _by_annotator(names, people, rows)
    yield _caption(
        names,
        rows,
        {"time": "median seconds per ranking, and the quartiles", "too fast": "took less time than reading does"},
    )


def _by_annotator(names: Sequence[str], people: Sequence[AnnotatorReport], rows: Sequence[Sequence[str]]) -> Table:
    """A row per annotator; columns in which nothing is known are omitted."""
    known = _known(rows)
    table = _table(names[0], *(names[1 + column] for column in known))
    for one, row in zip(people, rows, strict=True):
        table.add_row(Text(one_line(one.name)), *(row[column] for column in known))
    return table


def _caption(names: Sequence[str], rows: Sequence[Sequence[str]], meanings: Mapping[str, str]) -> RenderableType:
    """What the columns that are shown mean."""
    shown = [names[1 + column] for column in _known(rows)]
    said = "; ".join(f"{name}: {meaning}" for name, meaning in meanings.items() if name in shown)
    return Padding(Text(said, style="dim"), (0, 0, 0, 3))


def _known(rows: Sequence[Sequence[str]]) -> list[int]:
    return [column for column in range(len(rows[0])) if any(row[column] != _NOTHING for row in rows)]


def _pace(pace: Pace | None) -> tuple[str, str, str]:
    if pace is None:
        return _NOTHING, _NOTHING, _NOTHING
    hour = _NOTHING if pace.per_hour is None else f"{pace.per_hour:,.0f}"
    return f"{_plain(pace.median)} ({_plain(pace.lower)}-{_plain(pace.upper)})", hour, f"{pace.fast_share:.0%}"


def _plain(seconds: float) -> str:
    """Seconds without unit: a decimal where it says something."""
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:,.0f}"


def _pairs(report: LabelReport) -> Iterator[RenderableType]:
    pairs = sorted(report.agreement.pairs, key=lambda pair: (pair.agreement, pair.first, pair.second))
    table = _table("two annotators", "", "items", "agree", "kappa", "linear kappa", left=(0, 1))
    for pair in pairs[:_MOST_PAIRS]:
        kappas = (_NOTHING if kappa is None else _two(kappa) for kappa in (pair.kappa, pair.kappa_linear))
        table.add_row(
            Text(one_line(pair.first)), Text(one_line(pair.second)), f"{pair.items:,}", f"{pair.agreement:.0%}", *kappas
        )
    yield table
    kappas = "kappa: agreement of the two beyond chance; linear: a tie against a win is half a disagreement"
    yield Padding(Text(kappas, style="dim"), (0, 0, 0, 3))
    if len(pairs) > _MOST_PAIRS:
        yield Text(f"the {_MOST_PAIRS} of {len(pairs):,} with the lowest agreement; `--json` has all", style="dim")


def _distribution(report: LabelReport) -> Table:
    found: Distribution = report.distribution
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    if len(found.completions) > 1:
        table.add_row("completions per item", _shares(found.completions))
    table.add_row("different places per label", _shares(found.tiers) or _NOTHING)
    for size, shares in found.winners.items():
        positions = "  ".join(f"{_position(position)} {share:.0%}" for position, share in enumerate(shares))
        table.add_row(f"the best of {size} was shown as", f"{positions}  ({1 / size:.0%} each if unbiased)")
    if found.strengths:
        total = sum(found.strengths.values())
        named = zip(STRENGTHS, found.strengths.values(), strict=True)
        table.add_row("how much better", ", ".join(f"{name} {times / total:.0%}" for name, times in named))
    for name, criterion in found.criteria.items():
        total = sum(criterion.marks)
        marks = "  ".join(f"{mark}: {times / total:.0%}" for mark, times in enumerate(criterion.marks, start=1))
        agree = "" if criterion.agreement.value is None else f"; same mark {criterion.agreement.value:.0%}"
        alpha = "" if criterion.alpha.value is None else f", ordinal alpha {criterion.alpha.value:.2f}"
        table.add_row(Text(f"marks, {one_line(name)}"), f"{marks}{agree}{alpha}")
    return table


def _warnings(report: LabelReport) -> Iterator[RenderableType]:
    if report.counts.ranked and not report.warnings:
        yield Text("no warnings")
    yield from rendered(report.warnings)


def _next(report: LabelReport) -> Text:
    """What to do with the labels."""
    use = "`rlhf run RECIPE` trains a reward model on these labels, `rlhf label export` writes them for other tools"
    first = "read the warnings above, each of which says what to do" if report.warnings else ""
    return Text(f"next: {first}; then {use}" if first else f"next: {use}", style="bold")


def _table(*names: str, left: tuple[int, ...] = (0,)) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for position, name in enumerate(names):
        is_name = position in left
        table.add_column(
            name,
            justify="left" if is_name else "right",
            no_wrap=is_name,
            overflow="ellipsis" if is_name else "fold",
            max_width=_LONGEST_NAME if name in ("annotator", "two annotators", "") and is_name else None,
        )
    return table


def _short(figure: Estimate) -> str:
    if figure.value is None:
        return _NOTHING
    if figure.low is None or figure.high is None:
        return f"{figure.value:.0%}"
    return f"{figure.value:.0%} ±{(figure.high - figure.low) * 50:.0f}"


def _shares(counts: dict[int, int]) -> str:
    total = sum(counts.values())
    return "  ".join(f"{name}: {times / total:.0%}" for name, times in counts.items())


def _position(position: int) -> str:
    return chr(ord("A") + position) if position < 26 else str(position + 1)


def _two(value: float) -> str:
    return f"{value:.2f}"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
