"""What was measured of one model of an evaluation, and its figures with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf_cli.intervals import Measure, share_interval
from rlhf_cli.stages.evaluate.text_statistics import distinct, most_common_share, repeated_share
from rlhf_cli.statistics.best_of_n import kl_bound
from rlhf_cli.statistics.paired import by_prompt, mean_of, ratio_of_sums

if TYPE_CHECKING:
    from rlhf_cli.generation.generator import Completion
    from rlhf_cli.generation.policy import Policy, TokenScores

_OF_THE_SET = "a figure of all completions together: it has no interval over prompts"

_BOUND = "an upper bound of the KL to the model that the completions are drawn from, not an estimate"


@dataclass(frozen=True)
class Side:
    """One model of an evaluation.

    Attributes:
        name: for tables and results.
        policy: the model.
        completions: (N,) one per row; a prompt that was completed several times has several rows.
        scores: (N,) the model's own log-probabilities and entropies.
        demonstration_logprobs: log-probabilities of the tokens of each demonstration at temperature 1; may be empty.
        log_ratios: (N,) log policy - log baseline at each token, in nats; None for the baseline, and if the KL is not
            defined.
        gold: (N,) scores of the judge function, or None.
        reward: (N,) normalized rewards, or None.
        tasks: "task/metric" -> figure of `evaluate.tasks`.
        best_of: number of completions of which each is the best by the reward model. If it is above 1, `scores` is
            empty: the model's log-probabilities are not those of its best-of-n completions.
    """

    name: str
    policy: Policy
    completions: Sequence[Completion]
    scores: Sequence[TokenScores]
    demonstration_logprobs: Sequence[Sequence[float]] = field(default_factory=list)
    log_ratios: Sequence[Sequence[float]] | None = None
    gold: Sequence[float] | None = None
    reward: Sequence[float] | None = None
    tasks: Mapping[str, Measure] = field(default_factory=dict)
    best_of: int = 1

    @property
    def perplexity(self) -> Measure | None:
        """exp of the mean negative log-probability per token of the demonstrations, which are its units."""
        if not self.demonstration_logprobs:
            return None
        nats = [-math.fsum(logprobs) for logprobs in self.demonstration_logprobs]
        return _exponential(ratio_of_sums(nats, [len(logprobs) for logprobs in self.demonstration_logprobs]))

    def measures(self, keys: Sequence[str]) -> dict[str, Measure]:
        """Return the figures of the model.

        Args:
            keys: (N,) key of the prompt of each row.
        """
        texts = [completion.text for completion in self.completions]
        tokens = [float(len(completion.ids)) for completion in self.completions]
        mean: Callable[[Sequence[float]], Measure] = lambda values: mean_of(by_prompt(keys, values))  # noqa: E731
        found = {
            "tokens": mean(tokens),
            "characters": mean([float(len(text)) for text in texts]),
            "finished": _share(keys, [float(completion.finished) for completion in self.completions]),
            "repeated_4": mean([repeated_share([text], 4) for text in texts]),
            "distinct_2": Measure(distinct(texts, 2), None, None, len(texts), _OF_THE_SET),
            "most_common_share": Measure(most_common_share(texts), None, None, len(texts), _OF_THE_SET),
        }
        if self.best_of > 1:
            found["kl_upper_bound"] = Measure(kl_bound(self.best_of), None, None, len(texts), _BOUND)
        else:
            entropy = by_prompt(keys, [one.entropy for one in self.scores])
            found["entropy"] = ratio_of_sums(entropy, by_prompt(keys, tokens))
        if self.gold is not None:
            found["gold"] = mean(self.gold)
        if self.reward is not None:
            found["reward"] = mean(self.reward)
        if (perplexity := self.perplexity) is not None:
            found["perplexity"] = perplexity
        return found | {f"task/{name}": one for name, one in self.tasks.items()}


def _share(keys: Sequence[str], values: Sequence[float]) -> Measure:
    shares = by_prompt(keys, values)
    per_prompt = len(values) / len(shares)
    low, high = share_interval([share * per_prompt for share in shares], [per_prompt] * len(shares))
    return Measure(sum(shares) / len(shares), low, high, len(shares))


def _exponential(log: Measure) -> Measure:
    value, low, high = (None if end is None else math.exp(min(end, 700.0)) for end in (log.value, log.low, log.high))
    return Measure(value, low, high, log.n, log.missing)


def measures_to_json(measures: dict[str, Measure]) -> dict[str, Any]:
    """Return the plain values of figures."""
    return {name: measure.to_json() for name, measure in measures.items()}
