"""What `rlhf label stats` found, as plain data: for the terminal, the admin page, JSON and plots alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

REFERENCES = (
    ("Anthropic HH", 0.63, "researchers and crowd workers, pairs (Bai et al. 2022)"),
    ("InstructGPT", 0.726, "labelers with one another, K = 4 to 9, +- 0.015 (Ouyang et al. 2022)"),
    ("Summarize from feedback", 0.77, "labelers with researchers, pairs (Stiennon et al. 2020)"),
    ("MT-Bench, ties left out", 0.81, "people with one another, pairs (Zheng et al. 2023)"),
    ("MT-Bench, ties counted", 0.63, "the same, ties a third verdict (Zheng et al. 2023)"),
)
"""Agreement of people on which of two answers is better: project, share, who with whom."""
USUAL_AGREEMENT = (0.63, 0.77)
"""Range of what trained labelers of well-known projects reach."""
ALWAYS_LONGER = 0.622
"""How often picking the longer answer agrees with AlpacaEval's people (Dubois et al. 2023)."""
SECONDS_A_LABEL = 36.8
"""What a pair took AlpacaEval's people."""
LEAST_SECONDS_PER_100_CHARACTERS = 1.0
"""Below this nobody has read the answers: 1,000 words a minute at six characters a word with its blank, four times what
silent reading of English reaches (238, 4.2 s for 100 characters; Brysbaert 2019, a meta-analysis of 190 studies)."""


@dataclass(frozen=True)
class Figure:
    """A share or a coefficient.

    Attributes:
        value: None where there is none.
        low: lower end of its 95 % interval, None without one.
        high: upper end.
        count: what it is a share of: pairs of answers, or labels.
        prompts: they come from; prompts are what the interval draws.
        worth: independent observations that would be as exact, for intervals of other levels.
        missing: why there is no value.
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
    """How long labels took.

    Attributes:
        labels: whose time is known.
        median: active seconds a label.
        lower: first quartile.
        upper: third quartile.
        per_hour: rankings in an hour of active time, that of skips included; None where no time passed.
        fast: labels given faster than anybody can read, see `LEAST_SECONDS_PER_100_CHARACTERS`.
        course: (labels so far, median seconds of a stretch) in the order of labeling.
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
        """Share of labels given faster than anybody can read."""
        return self.fast / self.labels


@dataclass(frozen=True)
class Habit:
    """The ranking, by places shown, that an annotator gives most often.

    Attributes:
        pattern: such as `A>B=C`, A the answer shown first.
        times: how often.
        of: rankings of as many answers, with a known order of showing.
    """

    pattern: str
    times: int
    of: int


@dataclass(frozen=True)
class AnnotatorReport:
    """One annotator's figures.

    Attributes:
        name: as in the labels, a stranger's text.
        labels: ordinary labels that count.
        skipped: items left without a ranking.
        flagged: items reported.
        agreement: with the others, ties counted.
        agreement_untied: pairs that neither tied.
        others: agreement of the others with one another, ties counted.
        self_consistency: hidden repeats against their own earlier label, ties counted.
        gold: pairs of gold items put in the known order; a tie of theirs is half right.
        first_shown: untied pairs whose earlier-shown answer wins.
        longer: untied pairs of unlike length whose longer answer wins.
        tie_share: pairs tied.
        pace: None where no time is known.
        habit: None where no order of showing is known.
    """

    name: str
    labels: int
    skipped: int
    flagged: int
    agreement: Figure
    agreement_untied: Figure
    others: Figure
    self_consistency: Figure
    gold: Figure
    first_shown: Figure
    longer: Figure
    tie_share: float | None
    pace: Pace | None
    habit: Habit | None


@dataclass(frozen=True)
class PairReport:
    """Two annotators and what both labeled.

    Attributes:
        first: name.
        second: name.
        items: labeled by both.
        pairs: of answers in them.
        agreement: ties counted.
        kappa: Cohen's, of pairs of answers seen from both sides; None where it is not defined.
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
        agreement: pairs of annotators that gave an answer the same mark.
        alpha: Krippendorff's, ordinal.
    """

    marks: tuple[int, int, int, int, int]
    agreement: Figure
    alpha: Figure


@dataclass(frozen=True)
class Distribution:
    """What labels look like; ordinary labels only.

    Attributes:
        answers: K -> labels.
        tiers: tiers -> labels.
        winners: K -> share of labels won by the answer shown first, second, ...; those that tie for it share it.
        strengths: 1 to 4 -> labels.
        criteria: by name.
    """

    answers: dict[int, int]
    tiers: dict[int, int]
    winners: dict[int, tuple[float, ...]]
    strengths: dict[int, int]
    criteria: dict[str, CriterionReport]


@dataclass(frozen=True)
class LabelWarning:
    """Something that whoever runs the labeling should act on.

    Attributes:
        kind: a short name that stays the same.
        about: the annotator, the prompt, or "all labels".
        text: what was found, with its figure.
        advice: what to do.
    """

    kind: str
    about: str
    text: str
    advice: str


@dataclass(frozen=True)
class Counts:
    """How much there is.

    Attributes:
        labels: everything that was given, skips and flags included.
        ranked: with a ranking.
        ordinary: that count: neither repeat nor gold nor replaced.
        repeats: rankings of an item that its annotator had ranked before.
        gold: rankings of items whose order is known.
        skipped: without a ranking.
        flagged: reported.
        replaced: ordinary rankings that their annotator gave again later.
        reasons: why items were skipped or flagged -> how often.
        items: with a ranking that counts.
        prompts: of those items.
        shared_items: that two or more annotators ranked.
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
class Agreement:
    """How far annotators say the same of pairs of answers, over all who labeled them.

    Attributes:
        with_ties: same verdict of three (a, tie, b).
        without_ties: same winner, over pairs that neither annotator tied.
        tau_b: Kendall's, mean over items.
        alpha: Krippendorff's, nominal.
        alpha_ordinal: with a tie half-way.
        fleiss: Fleiss' kappa.
        ac1: Gwet's.
        ac2: Gwet's with quadratic weights.
        strengths: Gwet's AC2 of the winner with its strength, where strengths were asked.
        pairs: of annotators who have enough in common.
    """

    with_ties: Figure
    without_ties: Figure
    tau_b: Figure
    alpha: Figure
    alpha_ordinal: Figure
    fleiss: Figure
    ac1: Figure
    ac2: Figure
    strengths: Figure
    pairs: tuple[PairReport, ...]


@dataclass(frozen=True)
class LabelReport:
    """Everything; see its parts.

    Attributes:
        first_shown: untied pairs whose earlier-shown answer wins; 1/2 is no bias.
        longer: untied pairs of unlike length whose longer answer wins.
        tie_share: pairs tied, over ordinary labels.
        guidelines: hash, or `none` -> rankings.
        unknown: what the labels do not tell, one sentence each.
        more_prompts: further prompts that two people should label for an agreement within 5 points either way.
    """

    counts: Counts
    agreement: Agreement
    self_consistency: Figure
    gold: Figure
    first_shown: Figure
    longer: Figure
    tie_share: float | None
    pace: Pace | None
    distribution: Distribution
    annotators: tuple[AnnotatorReport, ...]
    guidelines: dict[str, int]
    unknown: tuple[str, ...]
    more_prompts: int
    warnings: tuple[LabelWarning, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """One object that `json.dumps` takes, the field's reference points beside."""
        references = [{"project": name, "agreement": share, "of": what} for name, share, what in REFERENCES]
        return asdict(self) | {"references": references}
