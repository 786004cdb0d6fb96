"""The update of one PPO step: clipped policy and value losses over epochs of minibatches.

Every loss is a sum over real tokens divided by the tokens of its whole minibatch, across micro-batches and processes,
so neither of them changes the gradient (trap 2 of docs/ppo.md).
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.generation.logprobs import TokenLogprobs
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.models.sharding import is_divided
from rlhf_cli.objectives.kl import kl_per_token
from rlhf_cli.objectives.masking import masked_sum
from rlhf_cli.objectives.policy import policy_loss, value_loss
from rlhf_cli.stages.ppo.forward_passes import Completions, ForwardPasses, RolloutTensors
from rlhf_cli.stages.ppo.models import PPOModels
from rlhf_cli.stages.ppo.ptx import SupervisedLoss
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.ppo.update_statistics import DeviceSums, Sums, UpdateStatistics, WorstRatio
from rlhf_cli.training.distributed import all_reduce_gradients
from rlhf_cli.training.optimization import adamw, clip_and_step
from rlhf_cli.training.schedules import rate_factor
from rlhf_cli.training.shuffle import shuffled


@dataclass(frozen=True)
class Experience:
    """What a step learns from; the same in every process.

    Attributes:
        completions: N completions.
        before: log-probabilities and values before the update.
        advantages: (N, T).
        returns: (N, T).
    """

    completions: Completions
    before: RolloutTensors
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Minibatch:
    """Some completions of a step.

    Attributes:
        rows: their numbers.
        experience: experience of the whole step.
        kl_coef: beta, for a penalty in the loss.
    """

    rows: list[int]
    experience: Experience
    kl_coef: float = 0.0

    @cached_property
    def tokens(self) -> int:
        """Real tokens of its completions, over all processes."""
        return sum(len(self.experience.completions.completion_ids[row]) for row in self.rows)


@dataclass(frozen=True)
class _Part:
    """A micro-batch of a minibatch.

    Attributes:
        minibatch: to which it belongs.
        rows: (B,) numbers of its completions, on the device.
        batch: their tokens.
        sums: receives what the losses add up.
    """

    minibatch: Minibatch
    rows: Tensor
    batch: SequenceBatch
    sums: DeviceSums

    def of(self, tensor: Tensor) -> Tensor:
        """Return its rows of a tensor (N, T) of the step, without columns that are padding in all of them."""
        return tensor[self.rows, : self.batch.completion_ids.shape[1]]


class Updater:
    """Owns the optimizer of policy and critic.

    Args:
        models: the models; their trained weights are optimized.
        forward_passes: forward passes, and the processes that share them.
        settings: section `ppo` of the recipe.
        seed: of the shuffles.
        supervised: the loss of PPO-ptx; None is plain PPO.

    Attributes:
        rate_scale: factor on all learning rates; 0.5 after a roll-back.
    """

    def __init__(
        self,
        models: PPOModels,
        forward_passes: ForwardPasses,
        settings: PPOSettings,
        *,
        seed: int,
        supervised: SupervisedLoss | None = None,
    ) -> None:
        self._models, self._forward_passes, self._settings, self._seed = models, forward_passes, settings, seed
        self.supervised = supervised
        self.rate_scale = 1.0
        policy, critic = models.policy_parameters(), models.critic_parameters()
        self._policy_parameters: list[nn.Parameter] = policy
        self._critic_parameters: list[nn.Parameter] = critic
        groups = [
            {"params": policy, "peak": settings.peak_rate, "begins": self._policy_begins},
            *({"params": weights, "peak": settings.critic_peak_rate, "begins": 0} for weights in _by_kind(critic)),
        ]
        # Epsilon 1e-5 as in every reference implementation since Baselines.
        trained = _model(models.policy()), _model(models.critic())
        self.optimizer = adamw(settings.optimizer, groups, *trained, rate=settings.peak_rate, epsilon=1e-5)

    def learning_rate(self, optimizer_step: int) -> float:
        """Return the learning rate of the policy at a 0-based optimizer step."""
        return self._settings.peak_rate * self._rate_factor(optimizer_step, self._policy_begins)

    @property
    def _policy_begins(self) -> int:
        """First optimizer step in which the policy learns."""
        return self._settings.critic_warmup_steps * self._settings.optimizer_steps_per_step

    def _rate_factor(self, optimizer_step: int, begins: int) -> float:
        """Return the factor on the peak rate of weights that learn from optimizer step `begins` on; 0 before."""
        if optimizer_step < begins:
            return 0.0
        total = self._settings.optimizer_steps - begins
        warmup = round(self._settings.warmup_share * total)
        factor = rate_factor(optimizer_step - begins, total, schedule=self._settings.schedule, warmup=warmup)
        return factor * self.rate_scale

    def update(self, step: int, experience: Experience, *, kl_coef: float) -> UpdateStatistics:
        """Train on the completions of one step.

        Args:
            step: 0-based, for the schedule and the shuffles.
            experience: experience of the step.
            kl_coef: beta of the step, for a penalty in the loss.
        """
        settings, statistics = self._settings, UpdateStatistics()
        for epoch in range(settings.epochs):
            number_of_epoch = step * settings.epochs + epoch
            order = shuffled(len(experience.completions), seed=self._seed, epoch=number_of_epoch, name="minibatches")
            before = statistics.sums.copy()
            for number in range(settings.minibatches):
                optimizer_step = (step * settings.epochs + epoch) * settings.minibatches + number
                minibatch = Minibatch(order[number :: settings.minibatches], experience, kl_coef)
                self._learn(minibatch, optimizer_step, step >= settings.critic_warmup_steps, statistics)
                if statistics.stopped:
                    break
            statistics.close_epoch(before)
            if statistics.stopped:
                break
        return statistics

    def _learn(
        self, minibatch: Minibatch, optimizer_step: int, trains_policy: bool, statistics: UpdateStatistics
    ) -> None:
        """Compute the gradient of one minibatch, and take an optimizer step unless KL, ratio or gradient forbid it."""
        settings = self._settings
        sums = self.accumulate(minibatch, statistics, trains_policy=trains_policy)
        tokens = sums["policy_tokens"]
        limit = settings.update_kl_limit
        if tokens and limit is not None and sums["approx_kl"] / tokens > limit:
            statistics.stopped = True
            self._clear()
        elif tokens and sums["ratio"] / tokens > settings.ratio_limit:
            statistics.ratio_skips += 1
            self._clear()
        else:
            if trains_policy and self.supervised is not None:
                self._mix_in(self.supervised, minibatch, optimizer_step, statistics)
            self._step(optimizer_step, trains_policy, statistics)

    def accumulate(self, minibatch: Minibatch, statistics: UpdateStatistics, *, trains_policy: bool = True) -> Sums:
        """Accumulate the gradient of this process's share of a minibatch's mean loss, one micro-batch at a time.

        Returns the sums of the minibatch over all processes, and adds them to `statistics`.
        """
        own = self._repeated(minibatch, trains_policy)
        gathered = self._forward_passes.processes.all_gather_object([own.sums(), astuple(own.worst())])
        found: Sums = defaultdict(float)
        for theirs, their_worst in gathered:
            for name, value in theirs.items():
                found[name] += value
            statistics.worst = max(statistics.worst, WorstRatio(*their_worst), key=lambda one: one.log_ratio)
        for name, value in found.items():
            statistics.sums[name] += value
        return found

    def _repeated(self, minibatch: Minibatch, trains_policy: bool) -> DeviceSums:
        """Run `_accumulate`, from zero gradients again where a pass gets no memory."""
        return self._forward_passes.repeated(lambda: self._accumulate(minibatch, trains_policy), self._clear)

    def _clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _accumulate(self, minibatch: Minibatch, trains_policy: bool) -> DeviceSums:
        """Run forward and backward of this process's micro-batches."""
        models, passes, sums = self._models, self._forward_passes, DeviceSums()
        completions = minibatch.experience.completions
        for numbers, weight in passes.passes(completions, minibatch.rows):
            batch = passes.batch(completions, numbers)
            rows = torch.tensor(numbers, device=passes.device)
            part = _Part(minibatch, rows, batch, sums if weight else DeviceSums())
            # Backward while the adapter is still active, since checkpointed activations are recomputed under it.
            if trains_policy:
                with models.policy() as model:
                    if models.critic_is_head:
                        now, values = passes.logprobs_and_values(model, batch)
                        (weight * (self._policy_loss(part, now) + self._value_loss(part, values))).backward()
                    else:
                        (weight * self._policy_loss(part, passes.logprobs(model, batch))).backward()
            if not (trains_policy and models.critic_is_head):
                with models.critic() as model:
                    values = passes.values(model, batch, trains_head_only=models.critic_is_head)
                    (weight * self._value_loss(part, values)).backward()
            part.sums.count("tokens", batch.tokens)
        return sums

    def _policy_loss(self, part: _Part, now: TokenLogprobs) -> Tensor:
        """Return a micro-batch's part of the minibatch's mean policy loss."""
        settings, sums, is_completion = self._settings, part.sums, part.batch.is_completion
        before = part.minibatch.experience.before
        policy = policy_loss(
            now.logprobs,
            part.of(before.logprobs),
            part.of(part.minibatch.experience.advantages),
            is_completion,
            clip_range=settings.clip_range,
        )
        loss = policy.loss
        if settings.kl_in == "loss":
            reference = part.of(before.reference_logprobs)
            kl = masked_sum(kl_per_token(now.logprobs, reference, settings.kl_estimator), is_completion)
            loss = loss + part.minibatch.kl_coef * kl
            sums.add("kl_loss", kl)
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * now.entropy.sum()
        sums.count("policy_tokens", part.batch.tokens)
        for name in ("approx_kl", "clipped", "ratio", "squared_ratio"):
            sums.add(name, getattr(policy, name))
        sums.add("policy_loss", policy.loss)
        sums.add("entropy", now.entropy.sum())
        sums.see(policy.largest_log_ratio, part.rows, policy.largest_position)
        return loss / part.minibatch.tokens

    def _value_loss(self, part: _Part, values: Tensor) -> Tensor:
        """Return a micro-batch's part of the minibatch's mean value loss."""
        experience = part.minibatch.experience
        critic = value_loss(
            values,
            part.of(experience.before.values),
            part.of(experience.returns),
            part.batch.is_completion,
            clip_range=self._settings.value_clip_range,
        )
        part.sums.add("value_loss", critic.loss)
        part.sums.add("value_clipped", critic.clipped)
        return self._settings.value_coef * critic.loss / part.minibatch.tokens

    def _mix_in(
        self, supervised: SupervisedLoss, minibatch: Minibatch, optimizer_step: int, statistics: UpdateStatistics
    ) -> None:
        def again() -> None:
            self._clear()
            self._repeated(minibatch, trains_policy=True)

        own = self._forward_passes.repeated(lambda: supervised.accumulate(optimizer_step), again)
        for loss, tokens in self._forward_passes.processes.all_gather_object(own):
            statistics.sums["ptx_loss"] += loss
            statistics.sums["ptx_tokens"] += tokens

    def _step(self, optimizer_step: int, trains_policy: bool, statistics: UpdateStatistics) -> None:
        policy, critic = self._policy_parameters if trains_policy else [], self._critic_parameters
        all_reduce_gradients([*policy, *critic], self._forward_passes.processes)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._rate_factor(optimizer_step, group["begins"])
        (policy_norm, critic_norm), is_taken = clip_and_step(
            self.optimizer,
            policy,
            critic,
            max_grad_norm=self._settings.max_grad_norm,
            step=optimizer_step // self._settings.optimizer_steps_per_step + 1,
        )
        if is_taken:
            statistics.policy_norms += [policy_norm] if trains_policy else []
            statistics.critic_norms.append(critic_norm)
        else:
            statistics.skipped_steps += 1


def _by_kind(weights: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return sharded weights and the others apart, since torch's optimizer does not step both at once."""
    parts = [[weight for weight in weights if is_divided(weight) is kind] for kind in (True, False)]
    return [part for part in parts if part]


def _model(used: AbstractContextManager[PreTrainedModel]) -> PreTrainedModel:
    with used as model:
        return model
