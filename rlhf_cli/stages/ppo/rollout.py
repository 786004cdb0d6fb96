"""Rollouts: which prompts a step takes, the policy's completions of them, and their rewards.

Everything is a function of seed and step: a resumed run, or one on another number of processes, takes the same prompts
and draws the same completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from rlhf_cli.data.records import Prompt, seed_for
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DivergedError
from rlhf_cli.generation.generator import Completion, Generator, Request
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.prompts import TokenizedPrompts
from rlhf_cli.models.sharding import gathered
from rlhf_cli.progress import warn
from rlhf_cli.rewards.base import Columns, Scores, columns_of
from rlhf_cli.settings.shared import StageSamplingSettings
from rlhf_cli.stages.ppo.forward_passes import Completions
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.training.shuffle import EndlessShuffle
from rlhf_cli.training.timing import StepWatch

RewardFunction = Callable[[Sequence[Prompt], Sequence[str], Columns], Scores]
"""N prompts, N completions as text, N >= 1, and what else is known of them -> one reward each, higher is better."""


def own_sampling(settings: PPOSettings) -> StageSamplingSettings:
    """Return what the section says of sampling. PPO draws from the whole distribution, whose log-probabilities it
    takes."""
    return StageSamplingSettings(
        temperature=settings.temperature,
        top_p=1.0,
        max_new_tokens=settings.max_new_tokens,
        stop_tokens=settings.stop_tokens,
        batch_size=settings.rollout_batch_size,
    )


class Rollouts:
    """Draws completions from the policy and scores them.

    Args:
        policy: what is being trained.
        generator: draws completions from it.
        reward: scores completions, as text.
        settings: section `ppo` of the recipe.
        seed: of prompt order and sampling.
        processes: of the run, which share the work.
    """

    def __init__(
        self,
        policy: Policy,
        generator: Generator,
        reward: RewardFunction,
        settings: PPOSettings,
        *,
        seed: int,
        processes: ProcessGroup,
    ) -> None:
        self._policy, self._generator, self._reward = policy, generator, reward
        self._settings, self._seed, self._processes = settings, seed, processes
        self._orders: dict[int, EndlessShuffle] = {}

    def rows_of(self, step: int, count: int) -> list[int]:
        """Return the prompts of a step, one row per completion: each epoch is one shuffle of all prompts.

        Args:
            step: 0-based.
            count: number of prompts.
        """
        needed = self._settings.prompts_per_step
        if count not in self._orders:
            self._orders[count] = EndlessShuffle(count, seed=self._seed, name="prompts")
        chosen = self._orders[count].slice(step * needed, (step + 1) * needed)
        return [row for row in chosen for _ in range(self._settings.samples_per_prompt)]

    def completions(
        self, source: TokenizedPrompts, rows: Sequence[int], numbers: Sequence[int], watch: StepWatch
    ) -> Completions:
        """Draw one completion per row and score it. Processes share the rows, and all of them get all completions.

        Args:
            source: prompts.
            rows: N rows of `source`.
            numbers: N numbers that tell completions of one prompt apart: each gives another seed.
            watch: times sampling and scoring.

        Raises:
            DivergedError: the policy's logits are not finite in some process; raised in all of them.
        """
        with self._policy.model() as model, gathered(model):
            return self._completions(source, rows, numbers, watch)

    def _completions(
        self, source: TokenizedPrompts, rows: Sequence[int], numbers: Sequence[int], watch: StepWatch
    ) -> Completions:
        mine = self._processes.shard(list(zip(rows, numbers, strict=True)))
        try:
            with watch.phase("rollout", "sampling"):
                drawn, failure = self._draw(source, mine, watch), None
        except DivergedError as error:
            drawn, failure = [], error
        if self._processes.any(failure is not None):  # one alone must not leave the others waiting
            raise failure or DivergedError("the policy's logits are not finite in another process")
        with watch.phase("scoring", "scoring"):
            scores = self._score([source.prompts[row] for row, _ in mine], drawn, source) if mine else Scores([], {})
            shares = self._processes.all_gather_object(_plain(drawn, scores))
        for share in shares[1:]:  # the reward has reported the faults of the first process itself
            for fault in share["faults"]:
                warn(fault)
        return _merged(source, rows, shares)

    def _score(self, prompts: Sequence[Prompt], drawn: Sequence[Completion], source: TokenizedPrompts) -> Scores:
        columns = columns_of(prompts, source.references, drawn, partial(self._policy.decode, raw=True))
        return self._reward(prompts, [completion.text for completion in drawn], columns)

    def _draw(self, source: TokenizedPrompts, mine: Sequence[tuple[int, int]], watch: StepWatch) -> list[Completion]:
        # Numbers count completions over the whole run: a prompt that comes again gets a new seed.
        requests = [Request(source.ids[row], seed_for(source.prompts[row], self._seed, number)) for row, number in mine]
        progress = watch.drawing(len(requests), self._policy.sampling.max_new_tokens)
        return self._generator.generate(self._policy, requests, progress=progress)


def _plain(drawn: Sequence[Completion], scores: Scores) -> dict[str, Any]:
    """Return one process's completions and scores as JSON values."""
    return {
        "ids": [completion.ids for completion in drawn],
        "finished": [completion.finished for completion in drawn],
        "texts": [completion.text for completion in drawn],
        "logprobs": [completion.logprobs for completion in drawn],
        "scores": scores.total,
        "parts": scores.parts,
        "faults": scores.faults,
    }


def _merged(source: TokenizedPrompts, rows: Sequence[int], shares: Sequence[dict[str, Any]]) -> Completions:
    """Return all processes' completions in the order of `rows`: process p of P had rows p, p + P, p + 2P, ..."""
    count = len(shares)

    def whole(get: Callable[[dict[str, Any]], Sequence[Any]]) -> list[Any]:
        return [get(shares[position % count])[position // count] for position in range(len(rows))]

    sampled = whole(lambda share: share["logprobs"])
    # A process without rows called no reward, so it does not know their names.
    names = max((list(share["parts"]) for share in shares), key=len)
    return Completions(
        prompts=[source.prompts[row] for row in rows],
        prompt_ids=[source.ids[row] for row in rows],
        completion_ids=whole(lambda share: share["ids"]),
        texts=whole(lambda share: share["texts"]),
        finished=whole(lambda share: share["finished"]),
        scores=torch.tensor(whole(lambda share: share["scores"]), dtype=torch.float32),
        parts={
            name: torch.tensor(whole(lambda share, name=name: share["parts"][name]), dtype=torch.float32)
            for name in names
        },
        faults=[fault for share in shares for fault in share["faults"]],
        sampler_logprobs=None if None in sampled else sampled,
    )
