"""Score a benchmark with a reward model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.progress import task
from rlhf_cli.rewards.benchmarks.formats import Benchmark

Rewards = list[tuple[list[float], list[float]]]
"""Per row, the rewards of its chosen and of its rejected completions."""


def score_benchmark(reward_model: RewardModel, benchmark: Benchmark, *, batch_size: int) -> Rewards:
    """Return the rewards of all completions of a benchmark; `batch_size` affects memory and speed only."""
    items = benchmark.items
    texts = [(item.prompt, text) for item in items for text in (*item.chosen, *item.rejected)]
    with task(f"scoring {benchmark.format}", len(texts), "completions") as bar:
        flat = iter(
            reward_model.score(
                [prompt for prompt, _ in texts],
                [text for _, text in texts],
                batch_size=batch_size,
                progress=bar.advance,
            )
        )
    return [(_next(flat, item.chosen), _next(flat, item.rejected)) for item in items]


def _next(flat: Iterator[float], texts: Sequence[str]) -> list[float]:
    return [next(flat) for _ in texts]
