"""Computes the label report: agreement of annotators, with one another and with themselves, and their biases.

Agreement and distributions use ordinary labels, self-consistency uses hidden repeats, accuracy uses gold items. Pace
and position bias use all three. See docs/label-statistics.md for how to read the results.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.labeling.label_records import LabelRecord
from rlhf_cli.labeling.statistics.agreement import (
    A_WINS,
    TIE,
    VERDICTS,
    Coefficient,
    cohen_kappa,
    fleiss_kappa,
    gwet_ac1,
    gwet_ac2,
    kendall_tau_b,
    krippendorff_alpha,
    mirrored,
    mirrored_table,
    verdicts,
)
from rlhf_cli.labeling.statistics.bootstrap import Bootstrap
from rlhf_cli.labeling.statistics.descriptive import (
    count_labels,
    distribution_of,
    guidelines_of,
    habit_of,
    pace_of,
    prompts_needed,
    strength_agreement,
    unknown_of,
)
from rlhf_cli.labeling.statistics.report import AnnotatorAgreement, AnnotatorReport, Estimate, LabelReport, PairReport
from rlhf_cli.labeling.statistics.table import Ints, LabelTable, levels_of, table_of
from rlhf_cli.labeling.statistics.warnings import warnings_of

ENOUGH_IN_COMMON = 10
"""Items that two annotators must have in common for a kappa of their own."""
_NO_OVERLAP = "no item was ranked by two annotators"
_WHY_NONE = {
    "untied": "no pair of completions was untied by two annotators",
    "self": "no hidden repeat was ranked",
    "gold": "no gold item was ranked",
    "first": "no untied pair with a known order of presentation",
    "longer": "no untied pair of different length",
}


def statistics(labels: Sequence[LabelRecord], seed: int) -> LabelReport:
    """Compute the report.

    Args:
        labels: valid labels, including skips and flags; an annotator's later label of an item replaces the earlier one.
        seed: of the bootstrap.

    Raises:
        DataError: a label is invalid, see `table_of`.
    """
    table = table_of(labels)
    bootstrap = Bootstrap(table.prompts, seed)
    shared = table.shared()
    _add_agreement(bootstrap, table, shared)
    _add_self_consistency(bootstrap, table)
    _add_gold(bootstrap, table)
    _add_order_and_length(bootstrap, table)
    counts, counted = _verdict_counts(table)
    _add_alpha(bootstrap, table, counts, counted)
    bootstrap.resample()
    agreement = _agreement(bootstrap, table, shared, counts)
    of_name: dict[str, list[LabelRecord]] = defaultdict(list)
    for label in labels:
        of_name[label.annotator].append(label)
    report = LabelReport(
        counts=count_labels(labels, table),
        agreement=agreement,
        self_consistency=bootstrap.share("self", _WHY_NONE["self"]),
        gold=bootstrap.share("gold", _WHY_NONE["gold"]),
        first_shown=bootstrap.share("first", _WHY_NONE["first"]),
        longer=bootstrap.share("longer", _WHY_NONE["longer"]),
        tie_share=_tie_share(table, table.counted),
        pace=pace_of(labels),
        distribution=distribution_of(table),
        annotators=tuple(
            _annotator(bootstrap, table, number, of_name[name]) for number, name in enumerate(table.names)
        ),
        guidelines=guidelines_of(table.labels),
        unknown=unknown_of(labels, table),
        more_prompts=prompts_needed(agreement.with_ties),
    )
    return replace(report, warnings=warnings_of(report, labels))


def _add_agreement(bootstrap: Bootstrap, table: LabelTable, shared: tuple[Ints, Ints]) -> None:
    first, second = shared
    owner, one = table.pairs(first)
    _, other = table.pairs(second)
    said, against = table.verdict[one], table.verdict[other]
    same, untied = said == against, (said != TIE) & (against != TIE)
    for name, values in (
        ("ties", np.column_stack([same, np.ones_like(same)])),
        ("untied", np.column_stack([same & untied, untied])),
    ):
        values = values.astype(np.float64)
        bootstrap.add(name, table.by_prompt(first[owner], values))
        rows = np.concatenate([first[owner], second[owner]])
        _add_each(bootstrap, name, table, rows, np.concatenate([values, values]))
    tau = _correlations(table, first, second)
    known = ~np.isnan(tau)
    # Correlations are averaged within items, then over items.
    of_item = np.bincount(table.item[first[known]], minlength=int(table.item.max(initial=-1)) + 1)
    weight = 1.0 / of_item[table.item[first[known]]]
    bootstrap.add("tau", table.by_prompt(first[known], np.column_stack([(tau[known] + 1) / 2 * weight, weight])))


def _correlations(table: LabelTable, first: Ints, second: Ints) -> NDArray[np.float64]:
    """Tau-b of N pairs of labels: (N,)."""
    tau = np.full(len(first), np.nan)
    for size in np.unique(table.size[first]):
        rows = np.flatnonzero(table.size[first] == size)
        one, other = (table.verdict[table.start[own[rows]][:, np.newaxis] + np.arange(size)] for own in (first, second))
        tau[rows] = kendall_tau_b(one, other)
    return tau


def _add_self_consistency(bootstrap: Bootstrap, table: LabelTable) -> None:
    again, before = table.repeats()
    owner, now = table.pairs(again)
    _, then = table.pairs(before)
    same = table.verdict[now] == table.verdict[then]
    _add_both(bootstrap, "self", table, again[owner], np.column_stack([same, np.ones_like(same)]))


def _add_gold(bootstrap: Bootstrap, table: LabelTable) -> None:
    rows = [row for row, label in enumerate(table.labels) if label.purpose == "gold" and label.known]
    known = [verdicts(np.array([levels_of(table.labels[row], table.labels[row].known or ())]))[0] for row in rows]
    labels = np.array(rows, dtype=np.intp)
    owner, pairs = table.pairs(labels)
    truth = np.concatenate(known) if known else np.zeros(0, dtype=np.int8)
    said = table.verdict[pairs]
    right = np.where(said == truth, 1.0, np.where(said == TIE, 0.5, 0.0))
    decided = truth != TIE
    _add_both(bootstrap, "gold", table, labels[owner], np.column_stack([right * decided, decided]))


def _add_order_and_length(bootstrap: Bootstrap, table: LabelTable) -> None:
    everyone = np.arange(len(table.labels))
    owner, pairs = table.pairs(everyone)
    won = np.where(table.verdict == A_WINS, 1, -1) * (table.verdict != TIE)
    for name, sign, used in (("first", table.earlier, True), ("longer", table.longer, table.counted[owner])):
        known = (sign[pairs] * won[pairs] != 0) & used
        _add_both(bootstrap, name, table, owner, np.column_stack([(sign[pairs] == won[pairs]) & known, known]))


def _add_both(bootstrap: Bootstrap, name: str, table: LabelTable, rows: Ints, values: NDArray) -> None:
    """Add sums over all annotators under `name`, and per annotator under `(name, number)`."""
    values = values.astype(np.float64)
    bootstrap.add(name, table.by_prompt(rows, values))
    _add_each(bootstrap, name, table, rows, values)


def _add_each(bootstrap: Bootstrap, name: str, table: LabelTable, rows: Ints, values: NDArray[np.float64]) -> None:
    for number, sums in enumerate(table.by_annotator(rows, table.annotator[rows], values)):
        bootstrap.add((name, number), sums)


def _verdict_counts(table: LabelTable) -> tuple[NDArray[np.int64], Ints]:
    """Number of annotators per verdict of each pair of completions: (N, 3); and one label of each pair: (N,)."""
    rows = np.flatnonzero(table.counted)
    owner, pairs = table.pairs(rows)
    items = table.item[rows]
    size = np.zeros(int(table.item.max(initial=-1)) + 1, dtype=np.intp)
    size[items] = table.size[rows]
    start = np.cumsum(size) - size
    unit = start[items][owner] + pairs - table.start[rows][owner]
    total = int(size.sum())
    flat = np.bincount(unit * VERDICTS + table.verdict[pairs], minlength=total * VERDICTS)
    label = np.zeros(total, dtype=np.intp)
    label[unit] = rows[owner]
    return flat.reshape(total, VERDICTS), label


def _add_alpha(bootstrap: Bootstrap, table: LabelTable, counts: NDArray[np.int64], label: Ints) -> None:
    shared = counts.sum(axis=1) >= 2
    each = counts[shared]
    seen = each.sum(axis=1)
    disagreed = (seen**2 - (each**2).sum(axis=1)) / (seen - 1)
    sums = np.column_stack([disagreed, seen, each[:, TIE]]).astype(np.float64)
    bootstrap.add("alpha", table.by_prompt(label[shared], sums))


def _agreement(
    bootstrap: Bootstrap, table: LabelTable, shared: tuple[Ints, Ints], counts: NDArray[np.int64]
) -> AnnotatorAgreement:
    both_ways = mirrored(counts)
    units, items = int((counts.sum(axis=1) >= 2).sum()), np.unique(table.item[shared[0]])

    def plain(found: Coefficient) -> Estimate:
        return Estimate(found.value, count=units, prompts=len(items), missing=found.missing)

    tau = bootstrap.share("tau", _NO_OVERLAP)
    return AnnotatorAgreement(
        with_ties=bootstrap.share("ties", _NO_OVERLAP),
        without_ties=bootstrap.share("untied", _WHY_NONE["untied"]),
        tau_b=replace(tau, **{end: _from_half(getattr(tau, end)) for end in ("value", "low", "high")}),
        alpha=bootstrap.alpha("alpha", krippendorff_alpha(both_ways), units),
        alpha_ordinal=plain(krippendorff_alpha(both_ways, "ordinal")),
        fleiss=plain(fleiss_kappa(both_ways)),
        ac1=plain(gwet_ac1(both_ways)),
        ac2=plain(gwet_ac2(both_ways)),
        strengths=strength_agreement(table),
        pairs=_pairs_of_annotators(table, shared),
    )


def _from_half(share: float | None) -> float | None:
    return None if share is None else 2 * share - 1


def _pairs_of_annotators(table: LabelTable, shared: tuple[Ints, Ints]) -> tuple[PairReport, ...]:
    first, second = shared
    turned = table.annotator[first] > table.annotator[second]
    first, second = np.where(turned, second, first), np.where(turned, first, second)
    people = len(table.names)
    keys, position, items = np.unique(
        table.annotator[first] * people + table.annotator[second], return_inverse=True, return_counts=True
    )
    owner, one = table.pairs(first)
    _, other = table.pairs(second)
    cell = (position[owner] * VERDICTS + table.verdict[one]) * VERDICTS + table.verdict[other]
    confusion = np.bincount(cell, minlength=len(keys) * VERDICTS**2).reshape(-1, VERDICTS, VERDICTS)
    found = []
    for key, own, common in zip(keys.tolist(), confusion, items.tolist(), strict=True):
        one_name, other_name = table.names[key // people], table.names[key % people]
        if common >= ENOUGH_IN_COMMON:
            both_ways, pairs = mirrored_table(own), int(own.sum())
            found.append(
                PairReport(
                    first=one_name,
                    second=other_name,
                    items=common,
                    pairs=pairs,
                    agreement=float(np.trace(own) / pairs),
                    kappa=cohen_kappa(both_ways).value,
                    kappa_linear=cohen_kappa(both_ways, "linear").value,
                )
            )
    return tuple(found)


def _annotator(bootstrap: Bootstrap, table: LabelTable, number: int, own: Sequence[LabelRecord]) -> AnnotatorReport:
    mine = table.annotator == number

    def share(key: str) -> Estimate:
        return bootstrap.share((key, number), _WHY_NONE.get(key, _NO_OVERLAP))

    return AnnotatorReport(
        name=table.names[number],
        labels=int((mine & table.counted).sum()),
        skipped=sum(label.outcome == "skipped" for label in own),
        flagged=sum(label.outcome == "flagged" for label in own),
        agreement=share("ties"),
        agreement_untied=share("untied"),
        others=bootstrap.rest("ties", ("ties", number), "no item was ranked by two others"),
        self_consistency=share("self"),
        gold=share("gold"),
        first_shown=share("first"),
        longer=share("longer"),
        tie_share=_tie_share(table, mine & table.counted),
        pace=pace_of(own),
        habit=habit_of(own),
    )


def _tie_share(table: LabelTable, labels: NDArray[np.bool_]) -> float | None:
    _, pairs = table.pairs(np.flatnonzero(labels))
    return float((table.verdict[pairs] == TIE).mean()) if len(pairs) else None
