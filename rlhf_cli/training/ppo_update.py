"""The update of one PPO step: epochs of minibatches of clipped policy and value losses.

Every loss is a sum over real tokens divided by the tokens of its whole minibatch, so cutting a minibatch into
micro-batches differently changes nothing (trap 2 of docs/ppo.md).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rlhf_cli.models.roles import Roles
from rlhf_cli.objectives.policy import policy_loss, value_loss
from rlhf_cli.rollout.experience import Answers, Engine, Passes
from rlhf_cli.training.ppo_options import PPOOptions
from rlhf_cli.training.schedules import rate_factor


@dataclass
class UpdateStatistics:
    """Sums over the real tokens an update saw, and what came of its optimiser steps.

    Attributes:
        sums: name -> sum over tokens (and epochs).
        tokens: real tokens, each counted once an epoch.
        epochs: per epoch, mean approx_kl, clip fraction and ratio, in that order.
        grad_norms: norm before clipping, an optimiser step.
        largest_log_ratio: (answer, |log ratio|) of the largest ratio seen.
        skipped_steps: optimiser steps left out because a gradient was not finite.
    """

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: int = 0
    epochs: list[tuple[float, float, float]] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    largest_log_ratio: tuple[int, float] = (0, 0.0)
    skipped_steps: int = 0

    def mean(self, name: str) -> float:
        """Mean a token."""
        return self.sums[name] / max(self.tokens, 1)


class Updater:
    """Owns the optimiser of policy and critic.

    Args:
        roles: the models; their trained weights are optimised.
        engine: forward passes.
        options: settings.
        seed: of the shuffles.
    """

    def __init__(self, roles: Roles, engine: Engine, options: PPOOptions, *, seed: int) -> None:
        self._roles, self._engine, self._options, self._seed = roles, engine, options, seed
        self.rate_scale = 1.0  # halved once training had to go back to a checkpoint
        self.parameters: list[nn.Parameter] = [*roles.policy_parameters(), *roles.critic_parameters()]
        critic_rate = options.critic_learning_rate or options.learning_rate
        groups = [
            {"params": roles.policy_parameters(), "peak": options.learning_rate},
            {"params": roles.critic_parameters(), "peak": critic_rate},
        ]
        # Epsilon 1e-5 as in every reference implementation since Baselines.
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, eps=1e-5, weight_decay=0.0)

    def learning_rate(self, optimizer_step: int) -> float:
        """Learning rate of the policy at an optimiser step."""
        return self._options.learning_rate * self._rate_factor(optimizer_step)

    def _rate_factor(self, optimizer_step: int) -> float:
        factor = rate_factor(optimizer_step, self._options.optimizer_steps, schedule=self._options.schedule)
        return factor * self.rate_scale

    def update(
        self, step: int, answers: Answers, before: Passes, advantages: Tensor, returns: Tensor
    ) -> UpdateStatistics:
        """Train on one step's answers.

        Args:
            step: 0-based, for the schedule and the shuffles.
            answers: N answers.
            before: passes before the update.
            advantages: (N, T).
            returns: (N, T).
        """
        options, statistics = self._options, UpdateStatistics()
        for epoch in range(options.epochs):
            # A function of seed, step and epoch: a resumed run shuffles as the uninterrupted one would.
            shuffle = torch.Generator().manual_seed(self._seed + 1_000_003 * (step * options.epochs + epoch))
            order = torch.randperm(len(answers), generator=shuffle).tolist()
            seen = dict(statistics.sums), statistics.tokens
            for number in range(options.minibatches):
                minibatch = order[number :: options.minibatches]
                self._accumulate(minibatch, answers, before, advantages, returns, statistics)
                self._step((step * options.epochs + epoch) * options.minibatches + number, statistics)
            statistics.epochs.append(_epoch_means(statistics, *seen))
        return statistics

    def _accumulate(
        self,
        minibatch: list[int],
        answers: Answers,
        before: Passes,
        advantages: Tensor,
        returns: Tensor,
        statistics: UpdateStatistics,
    ) -> None:
        """Add the gradient of one minibatch's mean loss, a micro-batch at a time."""
        options, engine = self._options, self._engine
        tokens = sum(len(answers.response_ids[row]) for row in minibatch)
        for rows in engine.micro_batches(answers, minibatch):
            batch = engine.batch(answers, rows)
            width, is_response = batch.response_ids.shape[1], batch.is_response
            # Backward while the role is still playing: checkpointed activations are recomputed under the same adapter.
            with self._roles.policy() as model:
                now = engine.logprobs(model, batch)
                old, advantage = before.logprobs[rows, :width], advantages[rows, :width]
                policy = policy_loss(now.logprobs, old, advantage, is_response, clip_range=options.clip_range)
                (policy.loss / tokens).backward()
            with self._roles.critic() as model:
                predicted = engine.values(model, batch)
                critic = value_loss(
                    predicted,
                    before.values[rows, :width],
                    returns[rows, :width],
                    is_response,
                    clip_range=options.value_clip_range,
                )
                (options.value_coef * critic.loss / tokens).backward()
            _add(statistics.sums, "policy_loss", policy.loss)
            _add(statistics.sums, "approx_kl", policy.approx_kl)
            _add(statistics.sums, "clipped", policy.clipped)
            _add(statistics.sums, "ratio", policy.ratio)
            _add(statistics.sums, "squared_ratio", policy.squared_ratio)
            _add(statistics.sums, "entropy", now.entropy.sum())
            _add(statistics.sums, "value_loss", critic.loss)
            _add(statistics.sums, "value_clipped", critic.clipped)
            statistics.tokens += int(is_response.sum())
            largest, place = policy.largest_ratio.max(dim=0)
            if float(largest) > statistics.largest_log_ratio[1]:
                statistics.largest_log_ratio = (rows[int(place)], float(largest))

    def _step(self, optimizer_step: int, statistics: UpdateStatistics) -> None:
        options = self._options
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, options.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._rate_factor(optimizer_step)
        if torch.isfinite(norm):
            self.optimizer.step()
            statistics.grad_norms.append(float(norm))
        else:
            # One bad batch must not poison the weights; the trainer counts these and stops when they repeat.
            statistics.skipped_steps += 1
        self.optimizer.zero_grad(set_to_none=True)


def _add(sums: dict[str, float], name: str, value: Tensor) -> None:
    sums[name] += float(value.detach())


def _epoch_means(after: UpdateStatistics, sums: dict[str, float], tokens: int) -> tuple[float, float, float]:
    count = max(after.tokens - tokens, 1)
    names = ("approx_kl", "clipped", "ratio")
    kl, clipped, ratio = ((after.sums[name] - sums.get(name, 0.0)) / count for name in names)
    return kl, clipped, ratio
