"""Warnings about labels, for problems that are statistically significant.

A warning needs an interval that excludes the expected value. For checks of each of several annotators the level is
1 - 0.05 / annotators (Bonferroni): in a group without any problem, each kind of warning names somebody in at most one
of twenty reports, however large the group is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from rlhf_cli.data.records import prompt_key, prompt_text
from rlhf_cli.intervals import jeffreys_interval
from rlhf_cli.labeling.label_records import LabelRecord
from rlhf_cli.labeling.statistics.descriptive import NO_GUIDELINES
from rlhf_cli.labeling.statistics.report import (
    ALWAYS_LONGER,
    LEAST_SECONDS_PER_100_CHARACTERS,
    AnnotatorReport,
    Estimate,
    LabelReport,
)
from rlhf_cli.labeling.warnings import ALL_LABELS, LabelWarning

LEAST_SELF_CONSISTENCY = 0.63
"""Agreement between different annotators, ties included (MT-Bench, Zheng et al. 2023)."""
LEAST_GOLD = 0.75
"""Our choice, half-way between chance and no errors: gold items should be clear."""
LEAST_DIFFERENCE = 0.05
"""Smaller differences of agreement do not matter, however certain they are."""
LEAST_ORDER_EFFECT = 0.02
"""A first-shown rate closer to 1/2 than this does not affect a reward model, however certain it is."""
WIDEST_HALF = 0.10
"""A wider interval of agreement to either side is hardly informative."""
MOST_FAST = 0.1
MOST_SKIPS = 0.25
MOST_BY_ONE = 0.9
SAME_HABIT = 0.9
ENOUGH_LABELS = 20
"""Minimum number of an annotator's labels for warnings about speed, skips or habits."""


def warnings_of(report: LabelReport, labels: Sequence[LabelRecord]) -> tuple[LabelWarning, ...]:
    """All warnings; those about all labels come first."""
    level = 1 - 0.05 / max(1, len(report.annotators))
    found = [*_of_all_labels(report), *_of_prompts(labels)]
    is_alone = _is_alone(report)
    for one in report.annotators:
        found += _of_annotator(one, level, is_alone=is_alone)
    return tuple(found)


def _of_all_labels(report: LabelReport) -> Iterator[LabelWarning]:
    yield from _overlap(report)
    first, longer = report.first_shown, report.longer
    if _favors_a_position(first) and not _is_alone(report):  # else the annotator is warned of
        yield LabelWarning(
            "order",
            ALL_LABELS,
            f"the completion shown {_favored(first)} is favored: the earlier-shown one wins {_with_interval(first)} of "
            "untied pairs, where a random order gives 50 %",
            "see below who causes it; remind annotators to read all completions before they rank",
            is_doubt=True,
        )
    if longer.low is not None and longer.low > ALWAYS_LONGER:
        yield LabelWarning(
            "length",
            ALL_LABELS,
            f"the longer completion wins {_with_interval(longer)} of untied pairs; always picking the longer one "
            f"agrees with {ALWAYS_LONGER:.1%} of AlpacaEval's labels",
            "say in the guidelines how to treat padding, and check that the reward model does not learn length alone",
            is_doubt=True,
        )
    told = {name: count for name, count in report.guidelines.items() if count}
    if len(told) > 1:
        parts = ", ".join(f"{name[:12]} ({count:,})" for name, count in told.items())
        without = " (`none`: without guidelines)" if NO_GUIDELINES in told else ""
        yield LabelWarning(
            "guidelines",
            ALL_LABELS,
            f"labels were given under {len(told)} versions of the guidelines{without}: {parts}",
            "measure agreement for each version, and repeat labels whose guidelines differed in substance",
            is_doubt=True,
        )


def _overlap(report: LabelReport) -> Iterator[LabelWarning]:
    annotators = [one for one in report.annotators if one.labels]
    total = sum(one.labels for one in annotators)
    if not total:
        return
    most = max(annotators, key=lambda one: one.labels)
    if len(annotators) == 1 or most.labels >= MOST_BY_ONE * total:
        yield LabelWarning(
            "one person",
            most.name,
            f"{most.labels:,} of {total:,} labels are by one annotator",
            "the reward model learns the taste of one person: add annotators, with some prompts in common "
            "(`label.human.overlap`)",
            is_doubt=False,
        )
    ties = report.agreement.with_ties
    more, has = report.more_prompts, report.counts.shared_prompts
    if ties.low is None or ties.high is None:
        yield LabelWarning(
            "overlap",
            ALL_LABELS,
            "no prompt was ranked by two annotators, so agreement is unknown",
            f"have a second annotator label about {more:,} prompts to measure agreement within +-5 points; a quarter "
            "of that gives +-10",
            is_doubt=False,
        )
    elif (ties.high - ties.low) / 2 > WIDEST_HALF:
        yield LabelWarning(
            "overlap",
            ALL_LABELS,
            f"too few prompts were ranked twice to measure agreement: {_with_interval(ties)} on {has:,} prompts",
            f"have a second annotator label about {more:,} more prompts to measure agreement within +-5 points",
            is_doubt=False,
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
        annotators = {label.annotator for label in own}
        if len(annotators) >= 2 and len(annotators) * 2 >= len(seen[key]):
            reasons = ", ".join(sorted({label.reason for label in own if label.reason})) or "no reason given"
            yield LabelWarning(
                "skipped prompt",
                _excerpt(prompt_text(own[0].prompt)),
                f"{len(annotators)} of {len(seen[key])} annotators skipped or flagged this prompt: {reasons}",
                "read it; remove it from the prompts, or say in the guidelines how to rank it",
                is_doubt=False,
            )


def _is_alone(report: LabelReport) -> bool:
    """Whether one annotator gave all labels, and is likely to be the one who reads this."""
    return len(report.annotators) == 1


def _of_annotator(one: AnnotatorReport, level: float, *, is_alone: bool) -> Iterator[LabelWarning]:
    yield from _consistency(one, level)
    if _favors_a_position(one.first_shown, level):
        yield LabelWarning(
            "order",
            one.name,
            f"favors the completion shown {_favored(one.first_shown)}: the earlier-shown one wins "
            f"{_with_interval(one.first_shown)} of {'' if is_alone else 'their '}untied pairs, where a random order "
            "gives 50 %",
            f"{'read all completions before you rank' if is_alone else 'talk to them'}; check the labels where the "
            f"completion shown {_favored(one.first_shown)} wins before you train on them",
            is_doubt=True,
        )
    pace = one.pace
    if pace is not None and pace.labels >= ENOUGH_LABELS and pace.fast_share > MOST_FAST:
        yield LabelWarning(
            "speed",
            one.name,
            f"{pace.fast:,} of {pace.labels:,} labels ({pace.fast_share:.0%}) took less than "
            f"{LEAST_SECONDS_PER_100_CHARACTERS:g} s per 100 characters of the completions, which is 1,000 words per "
            "minute",
            "this is faster than reading: check these labels, and exclude them unless they turn out to be good",
            is_doubt=True,
        )
    habit = one.habit
    if habit is not None and habit.of >= ENOUGH_LABELS and habit.times > SAME_HABIT * habit.of:
        yield LabelWarning(
            "habit",
            one.name,
            f"gave the same ranking by position, {habit.pattern}, in {habit.times:,} of {habit.of:,} labels",
            "the order of presentation is random, so these are not judgments: exclude them and "
            f"{'rank these prompts again' if is_alone else 'ask what happened'}",
            is_doubt=True,
        )
    shown = one.labels + one.skipped + one.flagged
    if shown >= ENOUGH_LABELS and one.skipped + one.flagged > MOST_SKIPS * shown:
        yield LabelWarning(
            "skips",
            one.name,
            f"skipped or flagged {one.skipped + one.flagged:,} of {shown:,} items "
            f"({(one.skipped + one.flagged) / shown:.0%})",
            f"{'see the reasons' if is_alone else 'ask why'}: unclear guidelines, a language that they do not read, or "
            "prompts that cannot be labeled",
            is_doubt=False,
        )


def _consistency(one: AnnotatorReport, level: float) -> Iterator[LabelWarning]:
    own, others = _bounds(one.agreement, level), _bounds(one.others, level)
    if own is not None and others is not None and own[1] < others[0]:
        gap = _value(one.others) - _value(one.agreement)
        if gap >= LEAST_DIFFERENCE:
            yield LabelWarning(
                "agreement",
                one.name,
                f"agrees with others on {_with_interval(one.agreement)} of pairs; the others agree with one another on "
                f"{_with_interval(one.others)}",
                "discuss some disagreements together: the cause may be the annotator, or unclear guidelines",
                is_doubt=True,
            )
    for kind, estimate, floor, what, advice in (
        ("self-consistency", one.self_consistency, LEAST_SELF_CONSISTENCY, "repeats their own verdict on",
         "self-consistency limits agreement with others: use shorter sessions, and fewer completions per prompt"),
        ("gold", one.gold, LEAST_GOLD, "ranks gold pairs in the known order in",
         "check that the gold items are clear; if they are, exclude this annotator's labels until it is resolved"),
    ):  # fmt: skip
        bounds = _bounds(estimate, level)
        if bounds is not None and bounds[1] < floor:
            yield LabelWarning(
                kind,
                one.name,
                f"{what} {_with_interval(estimate)} of pairs, from {estimate.prompts:,} prompts; at least {floor:.0%} "
                "is expected",
                advice,
                is_doubt=True,
            )


def _favored(first_shown: Estimate) -> str:
    return "first" if _value(first_shown) > 0.5 else "last"


def _favors_a_position(first_shown: Estimate, level: float = 0.95) -> bool:
    bounds = _bounds(first_shown, level)
    if bounds is None or bounds[0] <= 0.5 <= bounds[1]:
        return False
    return abs(_value(first_shown) - 0.5) >= LEAST_ORDER_EFFECT


def _bounds(estimate: Estimate, level: float) -> tuple[float, float] | None:
    """Interval at another level, from the effective number of observations."""
    return None if estimate.value is None else jeffreys_interval(estimate.value, estimate.worth, level)


def _value(estimate: Estimate) -> float:
    assert estimate.value is not None
    return estimate.value


def _with_interval(estimate: Estimate) -> str:
    assert estimate.low is not None
    assert estimate.high is not None
    return f"{_value(estimate):.1%} ({estimate.low:.0%} to {estimate.high:.0%})"


def _excerpt(text: str, longest: int = 60) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"
