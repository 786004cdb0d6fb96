"""Intervals of label statistics that hold what they say, and warnings that blame whom they should and nobody else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlhf_cli.intervals import PromptSums, resampled_sums
from rlhf_cli.labeling.statistics.report import LabelReport
from rlhf_cli.labeling.statistics.summary import statistics
from tests.labeling.crowd import Person, crowd, label


def kinds(report: LabelReport, about: str | None = None) -> set[str]:
    return {warning.kind for warning in report.warnings if about is None or warning.about == about}


def test_intervals_hold_the_truth_as_often_as_they_say():
    # The first-shown rate of annotators without a habit is 1/2: 95 % of intervals hold it, few prompts or many.
    for items in (12, 60):
        held = 0
        for seed in range(60):
            found = statistics(crowd([Person("a"), Person("b")], items=items, seed=seed), seed=0).first_shown
            assert found.low is not None
            assert found.high is not None
            held += found.low <= 0.5 <= found.high
        assert held >= 52, f"{held} of 60 at {items} prompts"


def test_the_interval_draws_prompts_and_not_pairs():
    one = [label("x", name, *range(4), shown=tuple(range(4))) for name in ("ana", "ben")]
    alike = [replace(copy, item=f"{number}", prompt="the same prompt") for number in range(40) for copy in one]
    apart = [replace(copy, item=f"{number}", prompt=f"prompt {number}") for number in range(40) for copy in one]
    widths = []
    for labels in (alike, apart):
        figure = statistics(labels, seed=0).agreement.with_ties
        assert figure.low is not None
        widths.append(1.0 - figure.low)
    assert widths[0] > 0.7, "one prompt, however often, proves nothing"
    assert 0.05 < widths[1] < 0.1, "40 prompts without a fault are no proof that there is none"


@pytest.mark.parametrize(("first", "shown"), [(100, "first"), (-100, "last")])
def test_advice_to_one_annotator_does_not_speak_of_others(first, shown):
    report = statistics(crowd([Person("ana", noise=0, first=first, seconds=1.5)], items=60, overlap=1), seed=0)
    assert kinds(report, "ana") >= {"order", "habit"}
    assert "order" not in kinds(report, "all labels"), "it is said once"
    advice = {warning.kind: warning.advice for warning in report.warnings}
    assert advice["order"] == (
        f"read all completions before you rank; check the labels where the completion shown {shown} wins before you "
        "train on them"
    )
    assert advice["habit"].endswith("exclude them and rank these prompts again")
    assert not [one for one in advice.values() if "talk to them" in one or "ask" in one.split()]


def test_a_labeler_who_clicks_the_first_completion_is_found():
    people = [*(Person(f"p{number}") for number in range(4)), Person("hasty", noise=0, first=100, seconds=1.5)]
    report = statistics(crowd(people, items=250, overlap=2, gold=10, repeats=0.2), seed=0)
    assert kinds(report, "hasty") == {"agreement", "gold", "self-consistency", "order", "speed", "habit"}
    hasty = next(person for person in report.annotators if person.name == "hasty")
    assert hasty.first_shown.value == 1.0
    assert hasty.habit is not None
    assert hasty.habit.pattern == "A>B>C>D"
    for number in range(4):
        assert not kinds(report, f"p{number}")
    assert kinds(report, "all labels") == {"order"}
    assert all(warning.is_doubt for warning in report.warnings)
    for warning in report.warnings:
        assert warning.text
        assert warning.advice


def test_a_group_without_fault_is_rarely_blamed():
    # At most 1 in 20 for the order of everybody, and 1 in 20 for that of somebody.
    blamed = 0
    for seed in range(20):
        labels = crowd([Person(f"p{number}", noise=0.4, tie=0.1) for number in range(6)], items=120, seed=seed)
        blamed += bool(statistics(labels, seed=0).warnings)
    assert blamed <= 6


def test_too_few_overlaps_say_how_many_more():
    alone = statistics(crowd([Person("ana"), Person("ben")], items=30, overlap=1), seed=0)
    assert alone.more_prompts == 323
    (warning,) = [one for one in alone.warnings if one.kind == "overlap"]
    assert "323 prompts" in warning.advice
    few = statistics(crowd([Person("ana"), Person("ben")], items=6), seed=0)
    figure = few.agreement.with_ties
    assert figure.low is not None
    assert figure.high is not None
    half = (figure.high - figure.low) / 2
    assert few.more_prompts == pytest.approx(6 * ((half / 0.05) ** 2 - 1), abs=1)
    assert "overlap" in kinds(few)
    many = statistics(crowd([Person("ana"), Person("ben")], items=400), seed=0)
    assert many.more_prompts == 0
    assert "overlap" not in kinds(many)


def test_one_person_two_guidelines_and_a_prompt_nobody_ranks_are_warnings():
    labels = [
        label(f"i{number}", "ana", 0, 1, guidelines="a" * 64 if number < 10 else "b" * 64) for number in range(30)
    ]
    odd = replace(label("odd", "ana", 0, 1), outcome="skipped", tiers=(), reason="no question")
    labels += [odd, replace(odd, annotator="ben", outcome="flagged", reason="private data")]
    report = statistics(labels, seed=0)
    assert kinds(report) >= {"one person", "guidelines", "skipped prompt", "overlap"}
    assert {warning.kind for warning in report.warnings if warning.is_doubt} == {"guidelines"}
    (skipped,) = [warning for warning in report.warnings if warning.kind == "skipped prompt"]
    assert skipped.about == "prompt odd"
    assert "no question, private data" in skipped.text
    assert report.guidelines == {"b" * 64: 20, "a" * 64: 10}
    assert report.counts.reasons == {"no question": 1, "private data": 1}


def test_resampled_sums_of_all_columns_see_the_same_draws():
    values = np.arange(6, dtype=float).reshape(3, 2)
    whole = PromptSums(np.arange(3), values)
    part = PromptSums(np.array([2]), values[2:])
    rest = PromptSums(np.arange(2), values[:2])
    one, two, three = resampled_sums([whole, part, rest], 3, resamples=50, seed=0)
    assert one == pytest.approx(two + three)
    assert one[:, 1] - one[:, 0] == pytest.approx(np.full(50, 3.0)), "every resample draws three prompts"
    assert len(np.unique(one[:, 0])) > 3
