"""Completions of the model before any training, for the rows of an evaluation that are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_cli.distributed.agreement import agreed
from rlhf_cli.errors import ModelError
from rlhf_cli.generation.generator import Completion
from rlhf_cli.progress import task, warn
from rlhf_cli.stages.evaluate.judge import Judge
from rlhf_cli.stages.evaluate.policies import base_policy
from rlhf_cli.stages.evaluate.rewards import rewarded
from rlhf_cli.stages.evaluate.sampling import Sampler

if TYPE_CHECKING:
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.stages.evaluate.settings import EvaluateSettings


def shown_rows(count: int, settings: EvaluateSettings) -> list[int]:
    """Return rows spread evenly over all completions, so that neither the best nor the worst are picked."""
    shown = min(settings.shown_samples, count)
    return [position * count // shown for position in range(shown)]


def base_rows(sampler: Sampler, of: Policy, judge: Judge | None) -> dict[int, tuple[Completion, float | None]]:
    """Return completions of the model before any training, with their scores, by number of the row that shows them.

    All processes call this. A judge function scores in rank 0 alone; the others get no scores.

    Args:
        sampler: with the prompts.
        of: the policy whose sampling and prompts it takes.
        judge: scores them; None lets the reward model do it, if there is one.
    """
    shown = shown_rows(len(sampler.prompts), sampler.context.settings)
    found = _sampled(sampler, of, shown)
    if found is None:
        return {}
    policy, completions = found
    prompts = [sampler.prompts[row] for row in shown]
    scores: Sequence[float | None] = [None] * len(prompts)
    if judge is None:
        (scores,) = rewarded(sampler.context, prompts, completions, processes=sampler.processes) or (scores,)
    elif sampler.processes.is_main:
        scores = judge.scores(prompts, policy, completions)
    return dict(zip(shown, zip(completions, scores, strict=True), strict=True))


def _sampled(sampler: Sampler, of: Policy, rows: Sequence[int]) -> tuple[Policy, list[Completion]] | None:
    """Return the model with its completions of some prompts; None if there is none, or it cannot be loaded."""
    found: list[Policy | None] = []
    try:
        agreed(lambda: found.append(base_policy(sampler.context, of)), sampler.processes)
        if (policy := found[0]) is None:
            return None
        try:
            return policy, _drawn(sampler, policy, rows)
        finally:
            policy.release()
    except ModelError as error:
        warn(f"completions of the base model are not shown: {error.message}")
        return None


def _drawn(sampler: Sampler, policy: Policy, rows: Sequence[int]) -> list[Completion]:
    """Return completions of some prompts, which the processes share; an error of a model is raised in all of them."""
    from rlhf_cli.generation.weights_to_draw import weights_to_draw

    def load() -> None:
        with policy.model():
            pass

    agreed(load, sampler.processes)
    requests, own = sampler.requests(policy), sampler.processes.shard(rows)
    drawn: list[Completion] = []

    def draw() -> None:
        chosen, stop = [requests[row][0] for row in own], sampler.context.stop.check
        drawn.extend(sampler.generator.generate(policy, chosen, progress=progress, stop=stop))

    with (
        weights_to_draw(policy, sampler.generator),
        task("base completions", len(rows), "completions", share=len(own)) as bar,
        sampler.watch.phase("rollout", "sampling"),
    ):
        progress = sampler.drawing(len(own), policy, bar)
        agreed(draw, sampler.processes)
    plain = sampler.processes.map(rows, lambda _: [dataclasses.asdict(one) for one in drawn])
    return [Completion(**one) for one in plain]
