"""Two policies on the same prompts: who wins, by how much, at what distance, and whether the text is still sound."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.data.records import Prompt, prompt_key, prompt_to_json
from rlhf_cli.generation.policy import Answer
from rlhf_cli.intervals import bootstrap_ratio, standard_error
from rlhf_cli.stages.evaluate.text_statistics import distinct, most_common_share, repeated_share

Winner = Literal["ppo", "sft", "tie"]


@dataclass(frozen=True)
class Comparison:
    """Both models' answers to one prompt, with what was said of them.

    Attributes:
        prompt: what was asked.
        sft: the baseline's answer.
        ppo: the answer of the policy under evaluation.
        kl: log pi_ppo - log pi_sft of the PPO answer, summed over its tokens, in nats; None where the two models do not
            share their ids.
        gold: scores by the judge function (SFT's, PPO's), or None.
        reward: normalized rewards (SFT's, PPO's), or None.
        base: the answer of the model before any training, for the few prompts that are shown.
        base_score: what the judge says of that.
    """

    prompt: Prompt
    sft: Answer
    ppo: Answer
    kl: float | None
    gold: tuple[float, float] | None
    reward: tuple[float, float] | None
    base: Answer | None = None
    base_score: float | None = None

    def winner(self, tie_margin: float) -> Winner:
        """Who has the higher gold score, or reward where there is no gold; a tie within `tie_margin`."""
        judged = self.gold if self.gold is not None else self.reward
        assert judged is not None
        sft, ppo = judged
        if abs(ppo - sft) <= tie_margin:
            return "tie"
        return "ppo" if ppo > sft else "sft"

    def to_json(self, tie_margin: float) -> dict[str, object]:
        """A line of samples.jsonl."""
        row: dict[str, object] = {"prompt": prompt_to_json(self.prompt), "sft": self.sft.text, "ppo": self.ppo.text}
        if self.base is not None:
            row |= {"base": self.base.text, "base_score": self.base_score}
        for name, scores in (("gold", self.gold), ("reward", self.reward)):
            if scores is not None:
                row |= {f"{name}_sft": scores[0], f"{name}_ppo": scores[1]}
        row |= {"tokens_sft": len(self.sft.ids), "tokens_ppo": len(self.ppo.ids)}
        row |= {"ended_sft": self.sft.ended, "ended_ppo": self.ppo.ended}
        if self.kl is not None:
            row["kl_nats"] = self.kl
        return row | {"winner": self.winner(tie_margin)}


def comparison_metrics(
    comparisons: Sequence[Comparison], *, tie_margin: float, resamples: int, seed: int
) -> dict[str, float]:
    """All figures of an evaluation.

    Several answers to one prompt count as one prompt: its mean is what is drawn again in the intervals.

    Args:
        comparisons: one an answer.
        tie_margin: scores that differ by at most this much are a tie, which counts 1/2.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    points = {"ppo": 1.0, "tie": 0.5, "sft": 0.0}
    wins = [points[comparison.winner(tie_margin)] for comparison in comparisons]
    by_prompt = _by_prompt(comparisons, wins)
    low, high = bootstrap_ratio(by_prompt, [1.0] * len(by_prompt), resamples=resamples, seed=seed)
    metrics = {
        "win_rate": _mean(by_prompt),
        "win_rate_low": low,
        "win_rate_high": high,
        "tie_rate": _mean([float(points_ == 0.5) for points_ in wins]),
        "prompts": float(len(by_prompt)),
        "answers": float(len(comparisons)),
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
    """Means of both models, and the mean difference with its standard error, paired by prompt."""
    known = [pair for pair in scores if pair is not None]
    if not known:
        return {}
    differences = _by_prompt(comparisons, [ppo - sft for sft, ppo in known])
    return {
        f"{name}/sft_mean": _mean([sft for sft, _ in known]),
        f"{name}/ppo_mean": _mean([ppo for _, ppo in known]),
        f"{name}/difference": _mean(differences),
        f"{name}/difference_se": standard_error(differences),
    }


def _text_metrics(comparisons: Sequence[Comparison]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    answers = {
        "sft": [comparison.sft for comparison in comparisons],
        "ppo": [comparison.ppo for comparison in comparisons],
    }
    for name, own in answers.items():
        texts = [answer.text for answer in own]
        metrics |= {
            f"length/{name}_mean": _mean([len(answer.ids) for answer in own]),
            f"ended/{name}": _mean([float(answer.ended) for answer in own]),
            f"diversity/{name}_most_common_share": most_common_share(texts),
            f"diversity/{name}_distinct_2": distinct(texts, 2),
            f"diversity/{name}_repeated_4": repeated_share(texts, 4),
        }
    # The policy's is the one a limit is set on: a policy that gives one answer to everything has collapsed.
    metrics["diversity/most_common_share"] = metrics["diversity/ppo_most_common_share"]
    metrics["length/ratio"] = metrics["length/ppo_mean"] / metrics["length/sft_mean"]
    return metrics


def _by_prompt(comparisons: Sequence[Comparison], values: Sequence[float]) -> list[float]:
    """Mean of the values of each prompt."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for comparison, value in zip(comparisons, values, strict=True):
        grouped[prompt_key(comparison.prompt)].append(value)
    return [_mean(own) for own in grouped.values()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
