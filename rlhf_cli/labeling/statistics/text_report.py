"""Formats a label report for the terminal: tables without frames, readable in a pipe or an e-mail too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_cli.labeling.label_records import STRENGTHS
from rlhf_cli.labeling.statistics.descriptive import NO_GUIDELINES
from rlhf_cli.labeling.statistics.report import (
    ALWAYS_LONGER,
    REFERENCES,
    SECONDS_PER_LABEL,
    AnnotatorAgreement,
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
    parts: list[RenderableType] = [*_counts(report), "", _agreement(report), _references()]
    if any(one.labels for one in report.annotators):
        parts += ["", _annotators(report.annotators), "", _habits(report.annotators)]
    if report.agreement.pairs:
        parts += ["", *_pairs(report)]
    parts += ["", _distribution(report)]
    if report.unknown:
        parts += ["", *(Text(f"unknown: {sentence}", style="dim") for sentence in report.unknown)]
    return Group(*parts, "", *_warnings(report))


def _counts(report: LabelReport) -> Iterator[Text]:
    counts, people = report.counts, len(report.annotators)
    yield Text(
        f"{_many(counts.ordinary, 'label')} by {people} {'annotator' if people == 1 else 'annotators'}: "
        f"{_many(counts.items, 'item')} of {_many(counts.prompts, 'prompt')}, {counts.shared_items:,} by two or more",
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
        (counts.repeats, "hidden repeats"),
        (counts.gold, "gold"),
        (counts.skipped, "skipped"),
        (counts.flagged, "flagged"),
        (counts.replaced, "replaced by a later label of the same annotator"),
    )
    return [f"{count:,} {what}" for count, what in each if count]


def _agreement(report: LabelReport) -> Table:
    found = report.agreement
    table = _table("all labels", "", "95 % interval", "of", left=(0, 3))
    if found.with_ties.value is None:
        _add(table, "agreement", found.with_ties, _percent, "")
    for name, figure, show in _agreement_rows(found) if found.with_ties.value is not None else ():
        _add(table, name, figure, show, "items" if figure is found.tau_b else "pairs")
    if found.strengths.value is not None:
        _add(table, "Gwet's AC2 of strengths", found.strengths, _two, "items")
    _add(table, "self-consistency", report.self_consistency, _percent, "pairs")
    _add(table, "gold accuracy", report.gold, _percent, "pairs")
    _add(table, "earlier shown wins (unbiased: 50%)", report.first_shown, _percent, "untied pairs")
    _add(table, f"longer wins (AlpacaEval: {ALWAYS_LONGER:.1%})", report.longer, _percent, "untied pairs")
    if report.tie_share is not None:
        table.add_row("ties", f"{report.tie_share:.1%}", "", "pairs")
    if report.pace is not None:
        pace = report.pace
        hour = "" if pace.per_hour is None else f", {pace.per_hour:,.0f} per hour"
        quartiles = f"{pace.lower:,.0f} to {pace.upper:,.0f}"
        table.add_row(
            f"seconds (AlpacaEval: {SECONDS_PER_LABEL})", f"{pace.median:,.1f}", quartiles, f"quartiles{hour}"
        )
    return table


def _agreement_rows(found: AnnotatorAgreement) -> tuple[tuple[str, Estimate, Callable[[float], str]], ...]:
    return (
        ("same winner, ties excluded", found.without_ties, _percent),
        ("same verdict, ties included", found.with_ties, _percent),
        ("Kendall's tau-b", found.tau_b, _two),
        ("Krippendorff's alpha", found.alpha, _two),
        ("  ordinal, tie in the middle", found.alpha_ordinal, _two),
        ("Fleiss' kappa", found.fleiss, _two),
        ("Gwet's AC1", found.ac1, _two),
        ("Gwet's AC2", found.ac2, _two),
    )


def _add(table: Table, name: str, figure: Estimate, show: Callable[[float], str], unit: str) -> None:
    if figure.value is None:
        table.add_row(name, _NOTHING, "", figure.missing)
        return
    interval = "" if figure.low is None or figure.high is None else f"{show(figure.low)} to {show(figure.high)}"
    table.add_row(name, show(figure.value), interval, f"{figure.count:,} {unit}")


def _references() -> Text:
    return Text(
        "published agreement: " + ", ".join(f"{name} {share:.1%}" for name, share, _ in REFERENCES), style="dim"
    )


def _annotators(people: Sequence[AnnotatorReport]) -> Table:
    table = _table("annotator", "labels", "skipped", "with others", "among others", "repeats", "gold")
    for one in people:
        table.add_row(
            Text(one_line(one.name)),
            f"{one.labels:,}",
            f"{one.skipped + one.flagged:,}",
            _short(one.agreement),
            _short(one.others),
            _short(one.self_consistency),
            _short(one.gold),
        )
    return table


def _habits(people: Sequence[AnnotatorReport]) -> Table:
    table = _table("annotator", "earlier wins", "longer wins", "ties", "seconds", "per hour", "too fast")
    for one in people:
        ties = _NOTHING if one.tie_share is None else f"{one.tie_share:.0%}"
        table.add_row(Text(one_line(one.name)), _short(one.first_shown), _short(one.longer), ties, *_pace(one.pace))
    return table


def _pace(pace: Pace | None) -> tuple[str, str, str]:
    if pace is None:
        return _NOTHING, _NOTHING, _NOTHING
    hour = _NOTHING if pace.per_hour is None else f"{pace.per_hour:,.0f}"
    return f"{pace.median:,.0f} ({pace.lower:,.0f}-{pace.upper:,.0f})", hour, f"{pace.fast_share:.0%}"


def _pairs(report: LabelReport) -> Iterator[RenderableType]:
    pairs = sorted(report.agreement.pairs, key=lambda pair: (pair.agreement, pair.first, pair.second))
    table = _table("two annotators", "", "items", "agree", "kappa", "linear kappa", left=(0, 1))
    for pair in pairs[:_MOST_PAIRS]:
        kappas = (_NOTHING if kappa is None else _two(kappa) for kappa in (pair.kappa, pair.kappa_linear))
        table.add_row(
            Text(one_line(pair.first)), Text(one_line(pair.second)), f"{pair.items:,}", f"{pair.agreement:.0%}", *kappas
        )
    yield table
    if len(pairs) > _MOST_PAIRS:
        yield Text(f"the {_MOST_PAIRS} of {len(pairs):,} with the lowest agreement; `--json` has all", style="dim")


def _distribution(report: LabelReport) -> Table:
    found: Distribution = report.distribution
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    if len(found.completions) > 1:
        table.add_row("completions per item", _shares(found.completions))
    table.add_row("tiers per label", _shares(found.tiers) or _NOTHING)
    for size, shares in found.winners.items():
        positions = "  ".join(f"{_position(position)} {share:.0%}" for position, share in enumerate(shares))
        table.add_row(f"position of the best of {size}", f"{positions}  ({1 / size:.0%} expected)")
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


def _table(*names: str, left: tuple[int, ...] = (0,)) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for position, name in enumerate(names):
        is_name = position in left
        table.add_column(
            name,
            justify="left" if is_name else "right",
            no_wrap=is_name and name != "of",
            overflow="ellipsis" if is_name else "fold",
            max_width=_LONGEST_NAME if name in ("annotator", "two annotators", "") and is_name else None,
        )
    return table


def _short(figure: Estimate) -> str:
    if figure.value is None or figure.low is None or figure.high is None:
        return _share(figure)
    return f"{figure.value:.0%} ±{(figure.high - figure.low) * 50:.0f}"


def _share(figure: Estimate) -> str:
    return _NOTHING if figure.value is None else f"{figure.value:.0%}"


def _shares(counts: dict[int, int]) -> str:
    total = sum(counts.values())
    return "  ".join(f"{name}: {times / total:.0%}" for name, times in counts.items())


def _position(position: int) -> str:
    return chr(ord("A") + position) if position < 26 else str(position + 1)


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
