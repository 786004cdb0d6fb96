"""Results of `rlhf label stats` as plain data, for the terminal, the admin page, JSON and plots."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rlhf_cli.labeling.warnings import LabelWarning

REFERENCES = (
    ("Anthropic HH", 0.63, "researchers and crowd workers, pairs (Bai et al. 2022)"),
    ("InstructGPT", 0.726, "annotators with one another, K = 4 to 9, +- 0.015 (Ouyang et al. 2022)"),
    ("Summarize from feedback", 0.77, "annotators with researchers, pairs (Stiennon et al. 2020)"),
    ("MT-Bench, ties excluded", 0.81, "people with one another, pairs (Zheng et al. 2023)"),
    ("MT-Bench, ties included", 0.63, "the same, ties a third verdict (Zheng et al. 2023)"),
)
"""Human agreement on which of two completions is better: project, share, between whom."""
USUAL_AGREEMENT = (0.63, 0.77)
"""Range reached by trained annotators of well-known projects."""
ALWAYS_LONGER = 0.622
"""Agreement of always picking the longer completion with AlpacaEval's annotators (Dubois et al. 2023)."""
SECONDS_PER_LABEL = 36.8
"""Time AlpacaEval's annotators needed per pair."""
LEAST_SECONDS_PER_100_CHARACTERS = 1.0
"""Anything faster is not reading: 1,000 words per minute at six characters per word including the space, four times
the speed of silent reading of English (238, or 4.2 s per 100 characters; Brysbaert 2019, a meta-analysis of 190
studies)."""


@dataclass(frozen=True)
class Estimate:
    """A share or a coefficient, with interval.

    Attributes:
        value: None if undefined.
        low: lower end of the 95 % interval; None without one.
        high: upper end.
        count: denominator: pairs of completions, or labels.
        prompts: number of prompts; they are the units that are resampled.
        worth: effective number of independent observations, for intervals at other levels.
        missing: reason why it is undefined.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    count: int = 0
    prompts: int = 0
    worth: float = 0.0
    missing: str = ""


@dataclass(frozen=True)
class Pace:
    """Time per label.

    Attributes:
        labels: number of labels with a known time.
        median: active seconds per label.
        lower: first quartile.
        upper: third quartile.
        per_hour: rankings per hour of active time, including the time for skips; None if no time passed.
        fast: labels given faster than reading speed, see `LEAST_SECONDS_PER_100_CHARACTERS`.
        course: (labels so far, median seconds of a segment) in order of labeling.
    """

    labels: int
    median: float
    lower: float
    upper: float
    per_hour: float | None
    fast: int
    course: tuple[tuple[int, float], ...]

    @property
    def fast_share(self) -> float:
        """Share of labels given faster than reading speed."""
        return self.fast / self.labels


@dataclass(frozen=True)
class Habit:
    """The ranking by shown position that an annotator gives most often.

    Attributes:
        pattern: such as `A>B=C`, where A was shown first.
        times: number of occurrences.
        of: rankings of as many completions, with a known order of presentation.
    """

    pattern: str
    times: int
    of: int


@dataclass(frozen=True)
class AnnotatorReport:
    """Results of one annotator.

    Attributes:
        name: as in the labels; untrusted text.
        labels: ordinary labels that count.
        skipped: items skipped.
        flagged: items flagged.
        agreement: with the others, ties included.
        agreement_untied: the same, over pairs that neither tied.
        others: agreement of the others with one another, ties included.
        self_consistency: agreement of hidden repeats with the earlier label, ties included.
        gold: share of gold pairs ranked in the known order; a tie counts 1/2.
        first_shown: share of untied pairs whose earlier-shown completion wins.
        longer: share of untied pairs of different length whose longer completion wins.
        tie_share: share of tied pairs.
        pace: None if no time is known.
        habit: None if no order of presentation is known.
    """

    name: str
    labels: int
    skipped: int
    flagged: int
    agreement: Estimate
    agreement_untied: Estimate
    others: Estimate
    self_consistency: Estimate
    gold: Estimate
    first_shown: Estimate
    longer: Estimate
    tie_share: float | None
    pace: Pace | None
    habit: Habit | None


@dataclass(frozen=True)
class PairReport:
    """Agreement of two annotators on what both labeled.

    Attributes:
        first: name.
        second: name.
        items: number labeled by both.
        pairs: number of pairs of completions in them.
        agreement: ties included.
        kappa: Cohen's, with pairs of completions counted from both sides; None if undefined.
        kappa_linear: the same with half credit for a tie against a win.
    """

    first: str
    second: str
    items: int
    pairs: int
    agreement: float
    kappa: float | None
    kappa_linear: float | None


@dataclass(frozen=True)
class CriterionReport:
    """Marks of one criterion.

    Attributes:
        marks: how often each of 1 to 5 was given.
        agreement: share of pairs of annotators that gave a completion the same mark.
        alpha: Krippendorff's, ordinal.
    """

    marks: tuple[int, int, int, int, int]
    agreement: Estimate
    alpha: Estimate


@dataclass(frozen=True)
class Distribution:
    """Distributions of ordinary labels.

    Attributes:
        completions: K -> labels.
        tiers: tiers -> labels.
        winners: K -> share of labels won by the completion shown first, second, ...; tied winners share it.
        strengths: 1 to 4 -> labels.
        criteria: per criterion.
    """

    completions: dict[int, int]
    tiers: dict[int, int]
    winners: dict[int, tuple[float, ...]]
    strengths: dict[int, int]
    criteria: dict[str, CriterionReport]


@dataclass(frozen=True)
class LabelCounts:
    """Numbers of labels, items and prompts.

    Attributes:
        labels: all labels, including skips and flags.
        ranked: labels with a ranking.
        ordinary: rankings that count: not a repeat, not gold, not replaced.
        repeats: rankings of hidden repeats.
        gold: rankings of gold items.
        skipped: skips.
        flagged: flags.
        replaced: ordinary rankings that the same annotator gave again later.
        reasons: reason of a skip or flag -> occurrences.
        items: with a ranking that counts.
        prompts: of those items.
        shared_items: items ranked by two or more annotators.
        shared_prompts: of those.
    """

    labels: int
    ranked: int
    ordinary: int
    repeats: int
    gold: int
    skipped: int
    flagged: int
    replaced: int
    reasons: dict[str, int]
    items: int
    prompts: int
    shared_items: int
    shared_prompts: int


@dataclass(frozen=True)
class AnnotatorAgreement:
    """Agreement on pairs of completions, over all annotators.

    Attributes:
        with_ties: same verdict of three (a, tie, b).
        without_ties: same winner, over pairs that neither annotator tied.
        tau_b: Kendall's, mean over items.
        alpha: Krippendorff's, nominal.
        alpha_ordinal: the same, with a tie between the wins.
        fleiss: Fleiss' kappa.
        ac1: Gwet's.
        ac2: Gwet's with quadratic weights.
        strengths: Gwet's AC2 of the winner with its strength, if strengths were asked for.
        pairs: per pair of annotators with enough common items.
    """

    with_ties: Estimate
    without_ties: Estimate
    tau_b: Estimate
    alpha: Estimate
    alpha_ordinal: Estimate
    fleiss: Estimate
    ac1: Estimate
    ac2: Estimate
    strengths: Estimate
    pairs: tuple[PairReport, ...]


@dataclass(frozen=True)
class LabelReport:
    """The complete report; see its parts.

    Attributes:
        first_shown: share of untied pairs whose earlier-shown completion wins; 1/2 means no bias.
        longer: share of untied pairs of different length whose longer completion wins.
        tie_share: share of tied pairs in ordinary labels.
        guidelines: hash, or `none` -> rankings.
        unknown: sentences that say what cannot be measured.
        more_prompts: further prompts that two annotators should label for an agreement within +- 5 points.
    """

    counts: LabelCounts
    agreement: AnnotatorAgreement
    self_consistency: Estimate
    gold: Estimate
    first_shown: Estimate
    longer: Estimate
    tie_share: float | None
    pace: Pace | None
    distribution: Distribution
    annotators: tuple[AnnotatorReport, ...]
    guidelines: dict[str, int]
    unknown: tuple[str, ...]
    more_prompts: int
    warnings: tuple[LabelWarning, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON, with reference values of the field."""
        references = [{"project": name, "agreement": share, "of": what} for name, share, what in REFERENCES]
        return asdict(self) | {"references": references}
