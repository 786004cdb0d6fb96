"""What whoever runs the labeling should act on, and when it is more than chance.

A warning about a figure needs an interval that excludes what it should be, not the figure alone. Where each of several
annotators is looked at, the level is 1 - 0.05 / annotators (Bonferroni), so that of a group without any fault somebody
is blamed in at most one of twenty reports for each kind of warning, however large the group is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from rlhf_cli.data.records import prompt_key, prompt_text
from rlhf_cli.intervals import wilson_interval
from rlhf_cli.labeling.label_records import LabelRecord
from rlhf_cli.labeling.statistics.parts import NO_GUIDELINES
from rlhf_cli.labeling.statistics.report import (
    ALWAYS_LONGER,
    LEAST_SECONDS_PER_100_CHARACTERS,
    AnnotatorReport,
    Figure,
    LabelReport,
    LabelWarning,
)

LEAST_SELF_CONSISTENCY = 0.63
"""What strangers agree with one another where ties count (MT-Bench, Zheng et al. 2023)."""
LEAST_GOLD = 0.75
"""Our choice, half-way between a coin and no mistake: gold items should be clear."""
LEAST_DIFFERENCE = 0.05
"""Agreement that differs by less is not worth a talk, however certain the difference is."""
LEAST_ORDER_EFFECT = 0.02
"""A first-shown rate nearer to 1/2 than this changes no reward model, however certain it is."""
WIDEST_HALF = 0.10
"""An interval of agreement wider than this to either side says next to nothing."""
MOST_FAST = 0.1
MOST_SKIPS = 0.25
MOST_BY_ONE = 0.9
SAME_HABIT = 0.9
ENOUGH_LABELS = 20
"""Labels of one person before their speed, skips or habits are judged."""

EVERYTHING = "all labels"


def warnings_of(report: LabelReport, labels: Sequence[LabelRecord]) -> tuple[LabelWarning, ...]:
    """All warnings, those about everything first."""
    level = 1 - 0.05 / max(1, len(report.annotators))
    found = [*_of_everything(report), *_of_prompts(labels)]
    for person in report.annotators:
        found += _of_person(person, level)
    return tuple(found)


def _of_everything(report: LabelReport) -> Iterator[LabelWarning]:
    yield from _overlap(report)
    first, longer = report.first_shown, report.longer
    if _favors_a_place(first):
        where = "first" if _value(first) > 0.5 else "last"
        yield LabelWarning(
            "order",
            EVERYTHING,
            f"the answer shown {where} is favored: the earlier-shown one wins {_with_interval(first)} of untied "
            "pairs, where a blind order gives 50 %",
            "look below who does it; remind labelers to read all answers before they rank, and keep the order random",
        )
    if longer.low is not None and longer.low > ALWAYS_LONGER:
        yield LabelWarning(
            "length",
            EVERYTHING,
            f"the longer answer wins {_with_interval(longer)} of untied pairs; {ALWAYS_LONGER:.1%} is what picking the "
            "longer one agrees with AlpacaEval's people",
            "say in the guidelines what padding costs, and check that a reward model does not learn length alone",
        )
    told = {name: count for name, count in report.guidelines.items() if count}
    if len(told) > 1:
        parts = ", ".join(f"{name[:12]} ({count:,})" for name, count in told.items())
        without = " (`none`: without any)" if NO_GUIDELINES in told else ""
        yield LabelWarning(
            "guidelines",
            EVERYTHING,
            f"labels were given under {len(told)} guidelines{without}: {parts}",
            "measure agreement for each, and label again what was given under a text that differed in substance",
        )


def _overlap(report: LabelReport) -> Iterator[LabelWarning]:
    people = [person for person in report.annotators if person.labels]
    total = sum(person.labels for person in people)
    if not total:
        return
    most = max(people, key=lambda person: person.labels)
    if len(people) == 1 or most.labels >= MOST_BY_ONE * total:
        yield LabelWarning(
            "one person",
            most.name,
            f"{most.labels:,} of {total:,} labels are by one person",
            "a reward model learns this person's taste: let others label, a part of the same prompts too "
            "(`label.human.overlap`)",
        )
    ties = report.agreement.with_ties
    more, has = report.more_prompts, report.counts.shared_prompts
    if ties.low is None or ties.high is None:
        yield LabelWarning(
            "overlap",
            EVERYTHING,
            "no prompt was ranked by two people, so agreement is not known",
            f"let a second person label about {more:,} prompts for an agreement within 5 points either way; a quarter "
            "of that gives 10",
        )
    elif (ties.high - ties.low) / 2 > WIDEST_HALF:
        yield LabelWarning(
            "overlap",
            EVERYTHING,
            f"too little was ranked twice to say how far people agree: {_with_interval(ties)} on {has:,} prompts",
            f"let a second person label about {more:,} more prompts for an agreement within 5 points either way",
        )


def _of_prompts(labels: Sequence[LabelRecord]) -> Iterator[LabelWarning]:
    seen: dict[str, set[str]] = defaultdict(set)
    refused: dict[str, list[LabelRecord]] = defaultdict(list)
    keys: dict[str, str] = {}
    for label in labels:
        key = keys.get(label.item) or keys.setdefault(label.item, prompt_key(label.prompt))
        seen[key].add(label.annotator)
        if label.outcome != "ranked":
            refused[key].append(label)
    for key, own in refused.items():
        people = {label.annotator for label in own}
        if len(people) >= 2 and len(people) * 2 >= len(seen[key]):
            reasons = ", ".join(sorted({label.reason for label in own if label.reason})) or "no reason given"
            yield LabelWarning(
                "skipped prompt",
                _excerpt(prompt_text(own[0].prompt)),
                f"{len(people)} of {len(seen[key])} people skipped or flagged this prompt: {reasons}",
                "read it; take it out of the prompts, or say in the guidelines how to decide",
            )


def _of_person(person: AnnotatorReport, level: float) -> Iterator[LabelWarning]:
    yield from _consistency(person, level)
    if _favors_a_place(person.first_shown, level):
        where = "first" if _value(person.first_shown) > 0.5 else "last"
        yield LabelWarning(
            "order",
            person.name,
            f"favors the answer shown {where}: the earlier-shown one wins {_with_interval(person.first_shown)} of "
            "their untied pairs, where a blind order gives 50 %",
            "talk to them; look at labels of theirs where first and best differ before these train anything",
        )
    pace = person.pace
    if pace is not None and pace.labels >= ENOUGH_LABELS and pace.fast_share > MOST_FAST:
        yield LabelWarning(
            "speed",
            person.name,
            f"{pace.fast:,} of {pace.labels:,} labels ({pace.fast_share:.0%}) took less than "
            f"{LEAST_SECONDS_PER_100_CHARACTERS:g} s for 100 characters of answers, which is 1,000 words a minute",
            "nobody reads that fast: look at these labels, and leave them out unless they prove right",
        )
    habit = person.habit
    if habit is not None and habit.of >= ENOUGH_LABELS and habit.times > SAME_HABIT * habit.of:
        yield LabelWarning(
            "habit",
            person.name,
            f"gave the same ranking by place, {habit.pattern}, in {habit.times:,} of {habit.of:,} labels",
            "the order of showing is random, so this is no judgment: leave these labels out and ask what happened",
        )
    shown = person.labels + person.skipped + person.flagged
    if shown >= ENOUGH_LABELS and person.skipped + person.flagged > MOST_SKIPS * shown:
        yield LabelWarning(
            "skips",
            person.name,
            f"left {person.skipped + person.flagged:,} of {shown:,} items without a ranking "
            f"({(person.skipped + person.flagged) / shown:.0%})",
            "ask what makes them skip: unclear guidelines, a language they do not read, or prompts unfit to label",
        )


def _consistency(person: AnnotatorReport, level: float) -> Iterator[LabelWarning]:
    own, others = _bounds(person.agreement, level), _bounds(person.others, level)
    if own is not None and others is not None and own[1] < others[0]:
        gap = _value(person.others) - _value(person.agreement)
        if gap >= LEAST_DIFFERENCE:
            yield LabelWarning(
                "agreement",
                person.name,
                f"agrees with others on {_with_interval(person.agreement)} of pairs; the others with one another on "
                f"{_with_interval(person.others)}",
                "go through some disagreements together: it may be the person, or the guidelines leave it open",
            )
    for kind, figure, floor, what, advice in (
        ("self-consistency", person.self_consistency, LEAST_SELF_CONSISTENCY, "repeats their own verdict on",
         "nobody can agree with others more than with themselves: shorter sessions, fewer answers at once"),
        ("gold", person.gold, LEAST_GOLD, "puts gold pairs in the known order in",
         "check that the gold items are clear; if they are, leave this person's labels out until it is settled"),
    ):  # fmt: skip
        bounds = _bounds(figure, level)
        if bounds is not None and bounds[1] < floor:
            yield LabelWarning(
                kind,
                person.name,
                f"{what} {_with_interval(figure)} of pairs, from {figure.prompts:,} prompts; at least {floor:.0%} is "
                "expected",
                advice,
            )


def _favors_a_place(first_shown: Figure, level: float = 0.95) -> bool:
    bounds = _bounds(first_shown, level)
    if bounds is None or bounds[0] <= 0.5 <= bounds[1]:
        return False
    return abs(_value(first_shown) - 0.5) >= LEAST_ORDER_EFFECT


def _bounds(figure: Figure, level: float) -> tuple[float, float] | None:
    """Interval at another level than the figure's own: Wilson's, of as many observations as the figure is worth."""
    return None if figure.value is None else wilson_interval(figure.value, figure.worth, level)


def _value(figure: Figure) -> float:
    assert figure.value is not None
    return figure.value


def _with_interval(figure: Figure) -> str:
    assert figure.low is not None
    assert figure.high is not None
    return f"{_value(figure):.1%} ({figure.low:.0%} to {figure.high:.0%})"


def _excerpt(text: str, longest: int = 60) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"
