"""Rollouts: which prompts a step takes, answers to them from the policy, and their rewards.

Everything is a function of seed and step: a resumed run, or one on another number of processes, asks the same prompts
and draws the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_cli.data.records import Prompt, seed_for
from rlhf_cli.errors import DivergedError
from rlhf_cli.generation.torch_generator import Sample, decode, sample
from rlhf_cli.progress import warn
from rlhf_cli.rewards.base import Scores
from rlhf_cli.stages.ppo.forward_passes import Answers, ForwardPasses
from rlhf_cli.stages.ppo.models import PPOModels
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.training.shuffle import EndlessShuffle
from rlhf_cli.training.task import ProgressCallback

RewardFunction = Callable[[Sequence[Prompt], Sequence[str]], Scores]
"""N prompts and N answers as text, N >= 1 -> a reward for each, higher is better."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts, with what sampling needs to know of their tokenizer.

    Attributes:
        prompts: as text or conversations.
        ids: their token ids.
        tokenizer: decodes the answers.
        eos_ids: tokens that end an answer.
    """

    prompts: Sequence[Prompt]
    ids: Sequence[list[int]]
    tokenizer: Any
    eos_ids: set[int]

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int) -> PromptSet:
        """The first `count` of them."""
        return PromptSet(self.prompts[:count], self.ids[:count], self.tokenizer, self.eos_ids)


class Rollouts:
    """Asks the policy.

    Args:
        roles: whose policy answers.
        engine: its precision, and the processes that share the work.
        reward: scores answers, as text.
        settings: section `ppo` of the recipe.
        seed: of prompt order and sampling.
    """

    def __init__(
        self, roles: PPOModels, engine: ForwardPasses, reward: RewardFunction, settings: PPOSettings, *, seed: int
    ) -> None:
        self._roles, self._engine, self._reward = roles, engine, reward
        self._settings, self._seed = settings, seed

    def rows_of(self, step: int, count: int) -> list[int]:
        """Prompts of a step, one entry an answer: the run walks through one shuffle of all prompts after another.

        Args:
            step: 0-based.
            count: prompts there are.
        """
        wanted = self._settings.prompts_per_step
        chosen = EndlessShuffle(count, seed=self._seed, name="prompts").slice(step * wanted, (step + 1) * wanted)
        return [row for row in chosen for _ in range(self._settings.samples_per_prompt)]

    def answers(
        self, source: PromptSet, rows: Sequence[int], numbers: Sequence[int], tell: ProgressCallback
    ) -> Answers:
        """Sample an answer to each row and score it, each process its share; all of them get all answers.

        Args:
            source: prompts.
            rows: N rows of `source`.
            numbers: N numbers that tell answers to one prompt apart: each gives another seed.
            tell: what is being done.

        Raises:
            DivergedError: in every process, where the policy's logits are not finite in one.
        """
        processes = self._engine.processes
        mine = processes.shard(list(zip(rows, numbers, strict=True)))
        tell("sampling")
        try:
            drawn, failure = self._sample(source, mine, tell), None
        except DivergedError as error:
            drawn, failure = [], error
        if processes.any(failure is not None):  # one alone must not leave the others waiting
            raise failure or DivergedError("the policy's logits are not finite in another process")
        texts = [decode(source.tokenizer, answer.ids) for answer in drawn]
        tell("scoring")
        scores = self._reward([source.prompts[row] for row, _ in mine], texts) if mine else Scores([], {})
        shares = processes.all_gather_object(_plain(drawn, texts, scores))
        for share in shares[1:]:  # what the first process found wrong, the reward itself has said
            for fault in share["faults"]:
                warn(fault)
        return _together(source, rows, shares)

    def _sample(self, source: PromptSet, mine: Sequence[tuple[int, int]], tell: ProgressCallback) -> list[Sample]:
        # The number is that of the answer in the run: a prompt that comes back gets a new seed.
        seeds = [seed_for(source.prompts[row], self._seed, number) for row, number in mine]
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            tell(f"sampling {done} of {len(mine)}")

        with self._roles.policy() as model, self._engine.autocast():
            return sample(
                model,
                [source.ids[row] for row, _ in mine],
                seeds,
                max_new_tokens=self._settings.max_new_tokens,
                temperature=self._settings.temperature,
                eos_ids=source.eos_ids,
                batch_size=self._settings.rollout_batch_size,
                progress=progress,
            )


def _plain(drawn: Sequence[Sample], texts: Sequence[str], scores: Scores) -> dict[str, Any]:
    """One process's answers as JSON can say them."""
    return {
        "ids": [answer.ids for answer in drawn],
        "ended": [answer.ended for answer in drawn],
        "texts": list(texts),
        "scores": scores.total,
        "parts": scores.parts,
        "faults": scores.faults,
    }


def _together(source: PromptSet, rows: Sequence[int], shares: Sequence[dict[str, Any]]) -> Answers:
    """All processes' answers in the order of `rows`: process p of P had every P-th, from the p-th on."""
    count = len(shares)

    def whole(get: Callable[[dict[str, Any]], Sequence[Any]]) -> list[Any]:
        return [get(shares[place % count])[place // count] for place in range(len(rows))]

    # A process without rows called no reward and knows no names.
    names = max((list(share["parts"]) for share in shares), key=len)
    return Answers(
        prompts=[source.prompts[row] for row in rows],
        prompt_ids=[source.ids[row] for row in rows],
        response_ids=whole(lambda share: share["ids"]),
        texts=whole(lambda share: share["texts"]),
        ended=whole(lambda share: share["ended"]),
        scores=torch.tensor(whole(lambda share: share["scores"]), dtype=torch.float32),
        parts={
            name: torch.tensor(whole(lambda share, name=name: share["parts"][name]), dtype=torch.float32)
            for name in names
        },
        faults=[fault for share in shares for fault in share["faults"]],
    )
