"""A policy compared with a baseline on the same prompts: win rate, scores, KL and statistics of the text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.data.records import Prompt, prompt_key, prompt_to_json
from rlhf_cli.generation.generator import Completion
from rlhf_cli.intervals import share_interval, standard_error
from rlhf_cli.stages.evaluate.text_statistics import distinct, most_common_share, repeated_share

Winner = Literal["policy", "baseline", "tie"]


@dataclass(frozen=True)
class Comparison:
    """Both models' completions of one prompt, with their scores.

    Attributes:
        prompt: what both completed.
        baseline: completion of the baseline.
        policy: completion of the policy under evaluation.
        kl: log pi_policy - log pi_baseline of the policy's completion, summed over its tokens, in nats; None if it is
            not defined.
        gold: scores of the judge function (baseline, policy), or None.
        reward: normalized rewards (baseline, policy), or None.
        base: completion of the model before any training, for the few prompts that are shown.
        base_score: its gold score, or its reward if there is no gold score.
        verdict: which is better by a panel of judges; None if scores decide.
    """

    prompt: Prompt
    baseline: Completion
    policy: Completion
    kl: float | None
    gold: tuple[float, float] | None
    reward: tuple[float, float] | None
    base: Completion | None = None
    base_score: float | None = None
    verdict: Winner | None = None

    def winner(self, tie_margin: float) -> Winner:
        """Return which is better by the judges, else which has the higher gold score, or reward if there is none.

        It is a tie within `tie_margin`, and where both wrote the same: another batch rounds a reward otherwise.
        """
        if self.verdict is not None:
            return self.verdict
        judged = self.gold if self.gold is not None else self.reward
        assert judged is not None
        baseline, policy = judged
        is_same = (self.policy.text, self.policy.finished) == (self.baseline.text, self.baseline.finished)
        if is_same or abs(policy - baseline) <= tie_margin:
            return "tie"
        return "policy" if policy > baseline else "baseline"

    def to_json(self, tie_margin: float) -> dict[str, object]:
        """Return a line of samples.jsonl."""
        sides = {"baseline": self.baseline, "policy": self.policy}
        row: dict[str, object] = {"prompt": prompt_to_json(self.prompt)}
        row |= {side: completion.text for side, completion in sides.items()}
        if self.base is not None:
            row |= {"base": self.base.text, "base_score": self.base_score}
        for name, scores in (("gold", self.gold), ("reward", self.reward)):
            if scores is not None:
                row |= {f"{name}_{side}": score for side, score in zip(sides, scores, strict=True)}
        row |= {f"tokens_{side}": len(completion.ids) for side, completion in sides.items()}
        row |= {f"finished_{side}": completion.finished for side, completion in sides.items()}
        if self.kl is not None:
            row["kl_nats"] = self.kl
        return row | {"winner": self.winner(tie_margin)}

    def policy_to_json(self, tie_margin: float) -> dict[str, object]:
        """Return what a line of samples.jsonl says of a further policy."""
        row: dict[str, object] = {"completion": self.policy.text}
        row |= {
            name: scores[1] for name, scores in (("gold", self.gold), ("reward", self.reward)) if scores is not None
        }
        row |= {"tokens": len(self.policy.ids), "finished": self.policy.finished}
        if self.kl is not None:
            row["kl_nats"] = self.kl
        return row | {"winner": self.winner(tie_margin)}


def comparison_metrics(comparisons: Sequence[Comparison], *, tie_margin: float) -> dict[str, float]:
    """Return all metrics of an evaluation.

    The win rate is the mean over prompts; its interval is `share_interval`.

    Args:
        comparisons: one per completion.
        tie_margin: scores that differ by at most this much are a tie, which counts 1/2.
    """
    points = {"policy": 1.0, "tie": 0.5, "baseline": 0.0}
    wins = [points[comparison.winner(tie_margin)] for comparison in comparisons]
    by_prompt = _by_prompt(comparisons, wins)
    per_prompt = len(comparisons) / len(by_prompt)
    low, high = share_interval([rate * per_prompt for rate in by_prompt], [per_prompt] * len(by_prompt))
    metrics = {
        "win_rate": _mean(by_prompt),
        "win_rate_low": low,
        "win_rate_high": high,
        "tie_rate": _mean([float(points_ == 0.5) for points_ in wins]),
        "prompts": float(len(by_prompt)),
        "completions": float(len(comparisons)),
    }
    distances = [comparison.kl for comparison in comparisons if comparison.kl is not None]
    if distances:
        metrics |= {"kl_nats": _mean(distances), "kl_nats_se": standard_error(_by_prompt(comparisons, distances))}
    metrics |= _scores("gold", comparisons, [comparison.gold for comparison in comparisons])
    metrics |= _scores("reward", comparisons, [comparison.reward for comparison in comparisons])
    return metrics | _text_metrics(comparisons)


def _scores(
    name: str, comparisons: Sequence[Comparison], scores: Sequence[tuple[float, float] | None]
) -> dict[str, float]:
    """Return the means of both models and of their difference, which is paired by prompt, with its standard error."""
    known = [pair for pair in scores if pair is not None]
    if not known:
        return {}
    differences = _by_prompt(comparisons, [policy - baseline for baseline, policy in known])
    return {
        f"{name}/baseline_mean": _mean([baseline for baseline, _ in known]),
        f"{name}/policy_mean": _mean([policy for _, policy in known]),
        f"{name}/difference": _mean(differences),
        f"{name}/difference_se": standard_error(differences),
    }


def _text_metrics(comparisons: Sequence[Comparison]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    sides = {
        "baseline": [comparison.baseline for comparison in comparisons],
        "policy": [comparison.policy for comparison in comparisons],
    }
    for name, own in sides.items():
        texts = [completion.text for completion in own]
        metrics |= {
            f"length/{name}_mean": _mean([len(completion.ids) for completion in own]),
            f"finished/{name}": _mean([float(completion.finished) for completion in own]),
            f"diversity/{name}_most_common_share": most_common_share(texts),
            f"diversity/{name}_distinct_2": distinct(texts, 2),
            f"diversity/{name}_repeated_4": repeated_share(texts, 4),
        }
    # The short name is for limits: a policy that completes every prompt the same way has collapsed.
    metrics["diversity/most_common_share"] = metrics["diversity/policy_most_common_share"]
    metrics["length/ratio"] = metrics["length/policy_mean"] / metrics["length/baseline_mean"]
    return metrics


def _by_prompt(comparisons: Sequence[Comparison], values: Sequence[float]) -> list[float]:
    """Return the mean of the values of each prompt."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for comparison, value in zip(comparisons, values, strict=True):
        grouped[prompt_key(comparison.prompt)].append(value)
    return [_mean(own) for own in grouped.values()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
