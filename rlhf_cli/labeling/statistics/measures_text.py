"""The measures over all labels as text: name, value, interval, and a sentence that says what each means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from rlhf_cli.durations import format_duration
from rlhf_cli.labeling.statistics.report import (
    ALWAYS_LONGER,
    REFERENCES,
    SECONDS_PER_LABEL,
    AnnotatorAgreement,
    Estimate,
    LabelReport,
    Pace,
)
from rlhf_cli.labeling.statistics.warnings import LEAST_GOLD, LEAST_SELF_CONSISTENCY

_NAME, _VALUE = 30, 8
"""Columns of a measure's name and value."""
_NOTHING = "-"


@dataclass(frozen=True)
class _Measure:
    """A measure over all labels.

    Attributes:
        name: of the measure.
        value: as text.
        rest: its interval and what it is measured on, or why it is not known.
        means: what it says, in a sentence.
    """

    name: str
    value: str
    rest: str
    means: str

    def lines(self) -> Iterator[RenderableType]:
        """The measure, and below it what it means."""
        yield Text(f"{self.name:<{_NAME}}{self.value:>{_VALUE}}  {self.rest}")
        yield Padding(Text(self.means, style="dim"), (0, 0, 0, 3))


def measures_text(report: LabelReport) -> Iterator[RenderableType]:
    """Yield the measures, below a heading."""
    yield Text(f"{'all labels':<{_NAME}}{'value':>{_VALUE}}  95 % interval, and what is counted", style="bold")
    for measure in _measures(report):
        yield from measure.lines()


def _measures(report: LabelReport) -> Iterator[_Measure]:
    yield from _agreement(report.agreement)
    yield _measure(
        "self-consistency",
        report.self_consistency,
        _percent,
        "pairs",
        "Hidden repeats, shown in reverse order, got the same verdict as before. "
        f"Below {LEAST_SELF_CONSISTENCY:.0%} is low.",
    )
    gold = f"Gold items were ranked in the known order; a tie counts half. Below {LEAST_GOLD:.0%} is low."
    yield _measure("gold accuracy", report.gold, _percent, "pairs", gold)
    first = "Of two completions, the one shown earlier won. 50% is unbiased."
    yield _measure("earlier shown wins", report.first_shown, _percent, "untied pairs", first)
    longer = (
        f"Of two completions, the longer one won. Above {ALWAYS_LONGER:.1%}, which always picking the longer one "
        "reaches in AlpacaEval, ask whether length decides."
    )
    yield _measure("longer wins", report.longer, _percent, "untied pairs", longer)
    if report.tie_share is not None:
        yield _Measure("ties", f"{report.tie_share:.1%}", "of pairs", "Completions that were ranked as equally good.")
    if report.pace is not None:
        yield _time(report.pace)


def _agreement(found: AnnotatorAgreement) -> Iterator[_Measure]:
    if found.with_ties.value is None:
        text = "Whether others would decide alike. It needs prompts that two or more annotators rank."
        yield _measure("agreement", found.with_ties, _percent, "", text)
    else:
        for name, estimate, show, means in _agreement_rows(found):
            yield _measure(name, estimate, show, "items" if estimate is found.tau_b else "pairs", means)
    if found.strengths.value is not None:
        yield _measure("Gwet's AC2 of strengths", found.strengths, _two, "items", "AC2 of who is better and how much.")


def _agreement_rows(found: AnnotatorAgreement) -> tuple[tuple[str, Estimate, Callable[[float], str], str], ...]:
    published = ", ".join(f"{name} {share:.1%}" for name, share, _ in REFERENCES)
    less = "where a tie against a win counts as a smaller disagreement."
    return (
        (
            "same winner, ties excluded",
            found.without_ties,
            _percent,
            f"Two annotators prefer the same completion, of pairs that neither ties. Published: {published}.",
        ),
        ("same verdict, ties included", found.with_ties, _percent, "They prefer the same completion, or both tie."),
        (
            "Kendall's tau-b",
            found.tau_b,
            _two,
            "How alike their rankings are: 1 is the same order, 0 unrelated, -1 reversed.",
        ),
        (
            "Krippendorff's alpha",
            found.alpha,
            _two,
            "Agreement beyond chance: 1 is complete, 0 what chance gives. Compare your batches with it.",
        ),
        ("  ordinal, tie in the middle", found.alpha_ordinal, _two, f"The same, {less}"),
        ("Fleiss' kappa", found.fleiss, _two, "Agreement beyond chance, without alpha's correction for few labels."),
        ("Gwet's AC1", found.ac1, _two, "Agreement beyond chance that depends less on how frequent ties are."),
        ("Gwet's AC2", found.ac2, _two, f"AC1, {less}"),
    )


def _measure(name: str, estimate: Estimate, show: Callable[[float], str], unit: str, means: str) -> _Measure:
    if estimate.value is None:
        return _Measure(name, _NOTHING, estimate.missing, means)
    interval = (
        "" if estimate.low is None or estimate.high is None else f"{show(estimate.low)} to {show(estimate.high)}, "
    )
    return _Measure(name, show(estimate.value), f"{interval}{estimate.count:,} {unit}", means)


def _time(pace: Pace) -> _Measure:
    hour = "" if pace.per_hour is None else f", {pace.per_hour:,.0f} rankings per hour"
    quartiles = f"half of them took {format_duration(pace.lower)} to {format_duration(pace.upper)}"
    means = f"Active time per ranking{hour}. AlpacaEval's annotators took {SECONDS_PER_LABEL} s per pair."
    return _Measure("median time", format_duration(pace.median), quartiles, means)


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _two(value: float) -> str:
    return f"{value:.2f}"
