"""PPO-ptx: demonstrations mixed into every update, so that the policy forgets less of what it was trained on before.

Ouyang et al. 2022 (arXiv:2203.02155), equation 2: gamma E[log pi(x)] over the pretraining data. Here it is the
supervised loss, a mean over completion tokens, on demonstrations that the recipe names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from rlhf_cli.data.token_lists import TokenLists
from rlhf_cli.stages.ppo.forward_passes import ForwardPasses
from rlhf_cli.stages.ppo.models import PPOModels
from rlhf_cli.training.shuffle import EndlessShuffle


@dataclass(frozen=True)
class Demonstrations:
    """N demonstrations in token ids.

    Attributes:
        prompt_ids: prompts, none empty.
        completion_ids: completions, the end token included; none empty.
    """

    prompt_ids: Sequence[list[int]]
    completion_ids: Sequence[list[int]]

    @staticmethod
    def of(pairs: Iterable[tuple[list[int], list[int]]]) -> Demonstrations:
        """Make them from (prompt, completion) ids; text without a prompt is predicted from its own first token on.

        A completion of one token without a prompt predicts nothing, and is skipped.
        """
        prompts, completions = TokenLists(), TokenLists()
        for prompt, completion in pairs:
            if prompt or len(completion) > 1:
                prompts.append(prompt or completion[:1])
                completions.append(completion if prompt else completion[1:])
        return Demonstrations(prompts, completions)

    def __len__(self) -> int:
        return len(self.prompt_ids)


class SupervisedLoss:
    """Adds the gradient of the supervised loss to an update.

    Args:
        models: the models, of which the policy learns.
        forward_passes: forward passes, and the processes that share them.
        demonstrations: source of the batches.
        coef: weight of the mean loss per completion token.
        batch_size: demonstrations per optimizer step, all processes together.
        seed: of their order.
    """

    def __init__(
        self,
        models: PPOModels,
        forward_passes: ForwardPasses,
        demonstrations: Demonstrations,
        *,
        coef: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self._models, self._forward_passes, self._demonstrations = models, forward_passes, demonstrations
        self._coef, self._batch_size = coef, batch_size
        self._order = EndlessShuffle(len(demonstrations), seed=seed, name="demonstrations")

    def accumulate(self, optimizer_step: int) -> tuple[float, int]:
        """Accumulate the gradient of this process's share; returns its summed loss and its tokens.

        Args:
            optimizer_step: 0-based, over the whole run; the batch is a function of it.
        """
        demonstrations = self._demonstrations
        rows = self._order.slice(optimizer_step * self._batch_size, (optimizer_step + 1) * self._batch_size)
        tokens = sum(len(demonstrations.completion_ids[row]) for row in rows)
        loss, counted = torch.zeros((), dtype=torch.float64, device=self._forward_passes.device), 0
        for part, weight in self._forward_passes.passes(demonstrations, rows):
            batch = self._forward_passes.batch(demonstrations, part)
            with self._models.policy() as model:
                # At temperature 1: demonstrations are not samples from the policy.
                found = self._forward_passes.logprobs(model, batch, temperature=1.0)
                (weight * -self._coef * found.logprobs.sum() / tokens).backward()
            loss -= weight * found.logprobs.detach().sum()
            counted += batch.tokens if weight else 0
        return float(loss), counted
