"""Results of an evaluation: every pair of models, and one JSON object in which every figure has its interval."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_cli.data.records import Prompt, prompt_key
from rlhf_cli.intervals import Measure, is_undecided, joint_level, share_interval
from rlhf_cli.stages.evaluate.comparison import Comparison, Winner
from rlhf_cli.stages.evaluate.sides import Side, measures_to_json
from rlhf_cli.stages.evaluate.text_statistics import Phrases, phrases
from rlhf_cli.statistics.kl import KLEstimate, disagreement, kl_estimate
from rlhf_cli.statistics.length_control import LengthControlled, length_controlled_win_rate
from rlhf_cli.statistics.paired import (
    PairedDifference,
    SignTest,
    by_prompt,
    paired_difference,
    ratio_of_sums,
    sign_test,
)
from rlhf_cli.statistics.wording import conclusion

PanelVerdicts = Mapping[tuple[int, int], Sequence[Winner]]
"""(i, j), i < j -> verdict on each row about model j as the policy and model i as the baseline; 0 is the baseline."""
_POINTS = {"policy": 1.0, "tie": 0.5, "baseline": 0.0}


@dataclass(frozen=True)
class Pair:
    """Two models compared on the same prompts.

    Attributes:
        policy: name of one.
        baseline: name of the other.
        win_rate: of the policy over prompts, ties 1/2, with the 95 % interval of this pair alone.
        joint: the win rate with the interval that decides: those of all pairs hold together with 95 %.
        pairs: number of pairs of the evaluation.
        outcomes: "wins", "ties" and "losses" of the policy, over all pairs of completions.
        identical_share: share of the pairs of completions that have the same text.
        phrases: most common first and last words of both.
        length_controlled: the win rate at equal lengths, in characters.
        sign_test: over prompts.
        differences: policy minus baseline of "gold" and "reward" as far as there are scores, and of "characters".
        kl: of the policy from the baseline in nats per completion, by both estimators; empty if it is not defined.
        kl_disagreement: why the two estimators differ by more than chance explains; None if they do not.
        alignment_tax: by how much the policy's negative log-probability of the demonstrations is larger, in nats per
            token; None without demonstrations or if the two read text differently.
    """

    policy: str
    baseline: str
    win_rate: Measure
    joint: Measure
    pairs: int
    outcomes: Mapping[str, int]
    identical_share: float
    phrases: Phrases
    length_controlled: LengthControlled
    sign_test: SignTest
    differences: dict[str, PairedDifference]
    kl: tuple[KLEstimate, ...] = ()
    kl_disagreement: str | None = None
    alignment_tax: Measure | None = None

    @property
    def conclusion(self) -> str:
        """What the win rate says, in a sentence."""
        return conclusion(self.joint, self.policy, self.baseline, comparisons=self.pairs)

    @property
    def is_decided(self) -> bool:
        """Whether it can be told which model is better."""
        assert self.joint.low is not None
        assert self.joint.high is not None
        return not is_undecided(self.joint.low, self.joint.high)

    def to_json(self) -> dict[str, Any]:
        """Return the plain values."""
        plain: dict[str, Any] = {
            "policy": self.policy,
            "baseline": self.baseline,
            "win_rate": self.win_rate.to_json(),
            "win_rate_joint": {**self.joint.to_json(), "pairs": self.pairs},
            "outcomes": dict(self.outcomes),
            "identical_share": self.identical_share,
            "phrases": self.phrases.to_json(),
            "length_controlled_win_rate": self.length_controlled.to_json(),
            "sign_test": self.sign_test.to_json(),
            "differences": {name: found.to_json() for name, found in self.differences.items()},
        }
        if self.kl:
            estimates: dict[str, Any] = {found.estimator: found.to_json() for found in self.kl}
            plain["kl_nats"] = estimates | {"disagreement": self.kl_disagreement}
        if self.alignment_tax is not None:
            plain["alignment_tax_nats_per_token"] = self.alignment_tax.to_json()
        return plain | {"conclusion": self.conclusion}


def comparisons_of(
    prompts: Sequence[Prompt], policy: Side, baseline: Side, verdicts: Sequence[Winner] | None = None
) -> list[Comparison]:
    """Return the comparison of two models on each row.

    Args:
        prompts: (N,) of the rows.
        policy: one model.
        baseline: the other.
        verdicts: (N,) of judges; None if scores decide.
    """

    def both(
        of_baseline: Sequence[float] | None, of_policy: Sequence[float] | None, row: int
    ) -> tuple[float, float] | None:
        return None if of_baseline is None or of_policy is None else (of_baseline[row], of_policy[row])

    return [
        Comparison(
            prompt=prompt,
            baseline=baseline.completions[row],
            policy=policy.completions[row],
            kl=None if policy.log_ratios is None else math.fsum(policy.log_ratios[row]),
            gold=both(baseline.gold, policy.gold, row),
            reward=both(baseline.reward, policy.reward, row),
            verdict=None if verdicts is None else verdicts[row],
        )
        for row, prompt in enumerate(prompts)
    ]


def pair_of(
    prompts: Sequence[Prompt],
    policy: Side,
    baseline: Side,
    *,
    tie_margin: float,
    is_baseline: bool,
    pairs: int = 1,
    verdicts: Sequence[Winner] | None = None,
) -> Pair:
    """Compare two models.

    Args:
        prompts: (N,) of the rows.
        policy: one model.
        baseline: the other.
        tie_margin: see `Comparison.winner`.
        is_baseline: whether the other is the baseline of the evaluation, to which the log-ratios refer.
        pairs: number of pairs of the evaluation.
        verdicts: (N,) of judges; None if scores decide.
    """
    keys = [prompt_key(prompt) for prompt in prompts]
    winners = [one.winner(tie_margin) for one in comparisons_of(prompts, policy, baseline, verdicts)]
    wins = [_POINTS[winner] for winner in winners]
    shares = by_prompt(keys, wins)
    per_prompt = len(wins) / len(shares)

    def win_rate(level: float) -> Measure:
        won = [share * per_prompt for share in shares]
        ends = share_interval(won, [per_prompt] * len(shares), level)
        return Measure(sum(shares) / len(shares), *ends, len(shares))

    ratios = policy.log_ratios if is_baseline else None
    counts = Counter(winners)
    texts, other_texts = ([one.text for one in side.completions] for side in (policy, baseline))
    longer_by = [float(len(own) - len(other)) for own, other in zip(texts, other_texts, strict=True)]
    return Pair(
        policy.name,
        baseline.name,
        win_rate(joint_level(1)),
        win_rate(joint_level(pairs)),
        pairs,
        {"wins": counts["policy"], "ties": counts["tie"], "losses": counts["baseline"]},
        sum(own == other for own, other in zip(texts, other_texts, strict=True)) / len(winners),
        phrases(other_texts, texts),
        length_controlled_win_rate(keys, wins, longer_by),
        sign_test([share - 0.5 for share in shares]),
        _differences(keys, policy, baseline),
        () if ratios is None else (kl_estimate(keys, ratios, "k1"), kl_estimate(keys, ratios, "k3")),
        None if ratios is None else disagreement(keys, ratios),
        _alignment_tax(policy, baseline),
    )


def _differences(keys: Sequence[str], policy: Side, baseline: Side) -> dict[str, PairedDifference]:
    lengths = [[float(len(completion.text)) for completion in side.completions] for side in (policy, baseline)]
    scores = {"gold": (policy.gold, baseline.gold), "reward": (policy.reward, baseline.reward), "characters": lengths}
    return {
        name: paired_difference(by_prompt(keys, [a - b for a, b in zip(own, other, strict=True)]))
        for name, (own, other) in scores.items()
        if own is not None and other is not None
    }


def _alignment_tax(policy: Side, baseline: Side) -> Measure | None:
    if not policy.demonstration_logprobs or policy.policy.reading != baseline.policy.reading:
        return None
    tokens = [len(logprobs) for logprobs in policy.demonstration_logprobs]
    lost = [
        math.fsum(theirs) - math.fsum(own)
        for own, theirs in zip(policy.demonstration_logprobs, baseline.demonstration_logprobs, strict=True)
    ]
    return ratio_of_sums(lost, tokens)


@dataclass(frozen=True)
class Evaluation:
    """All results.

    Attributes:
        decided_by: "function", "judges", "people" or "reward model": what decided which completion won.
        samples_per_prompt: completions of each model per prompt.
        baseline: name of the baseline.
        models: name -> figure -> value, the baseline first.
        pairs: every policy against the baseline, then the policies against one another.
    """

    decided_by: str
    samples_per_prompt: int
    baseline: str
    models: dict[str, dict[str, Measure]]
    pairs: list[Pair] = field(default_factory=list)

    @property
    def against_baseline(self) -> list[Pair]:
        """The pairs with the baseline, in the order of the policies."""
        return [pair for pair in self.pairs if pair.baseline == self.baseline]

    def to_json(self) -> dict[str, Any]:
        """Return what `evaluation.json` holds."""
        return {
            "judge": self.decided_by,
            "prompts": self.pairs[0].win_rate.n,
            "samples_per_prompt": self.samples_per_prompt,
            "baseline": self.baseline,
            "models": {name: measures_to_json(found) for name, found in self.models.items()},
            "pairs": [pair.to_json() for pair in self.pairs],
        }

    def flat_metrics(self) -> dict[str, float]:
        """Return the metrics that go beyond `comparison_metrics`; those of policies after the first by their names."""
        metrics: dict[str, float] = {}
        for number, pair in enumerate(self.against_baseline):
            prefix = f"{pair.policy}/" if number else ""
            controlled, kl = pair.length_controlled.win_rate, {one.estimator: one for one in pair.kl}
            found = {"sign_test_p": pair.sign_test.p_value, "win_rate_length_controlled": controlled.value}
            found |= {f"win_rate_length_controlled_{end}": getattr(controlled, end) for end in ("low", "high")}
            if "k3" in kl:
                found |= {"kl_nats_k3": kl["k3"].mean.value, "kl_nats_k3_se": kl["k3"].standard_error}
            if number and "k1" in kl:
                found |= {"kl_nats": kl["k1"].mean.value, "kl_nats_se": kl["k1"].standard_error}
            if number:
                found |= {"win_rate": pair.win_rate.value, "win_rate_low": pair.win_rate.low}
                found |= {"win_rate_high": pair.win_rate.high}
            if pair.pairs > 1:
                found |= {"win_rate_joint_low": pair.joint.low, "win_rate_joint_high": pair.joint.high}
            tasks = [name for name in self.models[pair.policy] if name.startswith("task/")]
            for name in ("entropy", "perplexity", *tasks):
                sides = {"baseline": self.baseline, "policy": pair.policy}
                found |= {
                    f"{name}/{side}": self.models[model][name].value
                    for side, model in sides.items()
                    if name in self.models[model]
                }
            metrics |= {f"{prefix}{name}": value for name, value in found.items() if value is not None}
        return {name: value for name, value in metrics.items() if math.isfinite(value)}


def evaluation_of(
    prompts: Sequence[Prompt],
    baseline: Side,
    policies: Sequence[Side],
    *,
    decided_by: str,
    tie_margin: float,
    verdicts: PanelVerdicts | None = None,
) -> Evaluation:
    """Compare every policy with the baseline, and the policies with one another.

    Args:
        prompts: (N,) of the rows.
        baseline: with its completions and scores.
        policies: likewise.
        decided_by: see `Evaluation`.
        tie_margin: see `Comparison.winner`.
        verdicts: of judges; None if scores decide.
    """
    keys, sides = [prompt_key(prompt) for prompt in prompts], [baseline, *policies]
    # Every policy with the baseline first, then the others.
    order = sorted(itertools.combinations(range(len(sides)), 2), key=lambda pair: pair[0] > 0)
    pairs = [
        pair_of(
            prompts,
            sides[later],
            sides[earlier],
            tie_margin=tie_margin,
            is_baseline=earlier == 0,
            pairs=len(order),
            verdicts=None if verdicts is None else verdicts[earlier, later],
        )
        for earlier, later in order
    ]
    models = {side.name: side.measures(keys) for side in sides}
    return Evaluation(decided_by, len(prompts) // len(set(keys)), baseline.name, models, pairs)
