"""The update of one PPO step: clipped policy and value losses over epochs of minibatches.

Every loss is a sum over real tokens divided by the tokens of its whole minibatch, across micro-batches and processes,
so neither of them changes the gradient (trap 2 of docs/ppo.md).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field

from torch import Tensor, nn

from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.objectives.kl import kl_per_token
from rlhf_cli.objectives.masking import masked_sum
from rlhf_cli.objectives.policy import policy_loss, value_loss
from rlhf_cli.stages.ppo.forward_passes import Completions, ForwardPasses, RolloutTensors
from rlhf_cli.stages.ppo.models import PPOModels
from rlhf_cli.stages.ppo.ptx import SupervisedLoss
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.training.adamw import AdamW
from rlhf_cli.training.distributed import all_reduce_gradients
from rlhf_cli.training.optimization import clip_and_step
from rlhf_cli.training.schedules import rate_factor
from rlhf_cli.training.shuffle import shuffled

Sums = defaultdict[str, float]
"""Name -> sum, 0 for a name without one."""


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
class WorstRatio:
    """The token whose probability changed the most.

    Attributes:
        log_ratio: |log pi_new / pi_old|, nats.
        completion: number of its completion in the step.
        token: number of the token in that completion.
    """

    log_ratio: float = 0.0
    completion: int = 0
    token: int = 0


@dataclass
class UpdateStatistics:
    """Sums over the real tokens of an update, and the outcome of its optimizer steps.

    Attributes:
        sums: name -> sum over tokens (and epochs); `tokens`, `policy_tokens` and `ptx_tokens` count them.
        epochs: per epoch, mean approx_kl, clip fraction and ratio, in that order.
        policy_norms, critic_norms: gradient norms before clipping, per optimizer step that trained the model.
        worst: the largest ratio.
        skipped_steps: optimizer steps skipped because a gradient was not finite.
        ratio_skips: optimizer steps skipped because the mean ratio exceeded its limit.
        stopped: whether the update ended early because of its KL.
    """

    sums: Sums = field(default_factory=lambda: defaultdict(float))
    epochs: list[tuple[float, float, float]] = field(default_factory=list)
    policy_norms: list[float] = field(default_factory=list)
    critic_norms: list[float] = field(default_factory=list)
    worst: WorstRatio = WorstRatio()
    skipped_steps: int = 0
    ratio_skips: int = 0
    stopped: bool = False

    def mean(self, name: str, per: str = "tokens") -> float:
        """Return the mean per token of those that `per` counts; NaN without any."""
        return self.sums[name] / self.sums[per] if self.sums[per] else math.nan

    def close_epoch(self, before: Sums) -> None:
        """Add the means of an epoch, given the sums before it."""
        tokens = self.sums["policy_tokens"] - before["policy_tokens"]
        names = ("approx_kl", "clipped", "ratio")
        kl, clipped, ratio = ((self.sums[name] - before[name]) / tokens if tokens else math.nan for name in names)
        self.epochs.append((kl, clipped, ratio))


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

    @property
    def tokens(self) -> int:
        """Real tokens of its completions, over all processes."""
        return sum(len(self.experience.completions.completion_ids[row]) for row in self.rows)


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
            {"params": critic, "peak": settings.critic_peak_rate, "begins": 0},
        ]
        # Epsilon 1e-5 as in every reference implementation since Baselines.
        self.optimizer = AdamW(groups, lr=settings.peak_rate, eps=1e-5, weight_decay=0.0)

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
            self.optimizer.zero_grad(set_to_none=True)
        elif tokens and sums["ratio"] / tokens > settings.ratio_limit:
            statistics.ratio_skips += 1
            self.optimizer.zero_grad(set_to_none=True)
        else:
            if trains_policy and self.supervised is not None:
                self._mix_in(self.supervised, optimizer_step, statistics)
            self._step(optimizer_step, trains_policy, statistics)

    def accumulate(self, minibatch: Minibatch, statistics: UpdateStatistics, *, trains_policy: bool = True) -> Sums:
        """Accumulate the gradient of this process's share of a minibatch's mean loss, one micro-batch at a time.

        Returns the sums of the minibatch over all processes, and adds them to `statistics`.
        """
        experience, tokens = minibatch.experience, minibatch.tokens
        sums: Sums = defaultdict(float)
        worst = WorstRatio()
        for rows in self._forward_passes.micro_batches(experience.completions, minibatch.rows):
            batch = self._forward_passes.batch(experience.completions, rows)
            # Backward while the adapter is still active, since checkpointed activations are recomputed under it.
            if trains_policy:
                worst = max(worst, self._policy(minibatch, rows, batch, tokens, sums), key=lambda one: one.log_ratio)
            self._critic(minibatch, rows, batch, tokens, sums)
            sums["tokens"] += int(batch.is_completion.sum())
        gathered = self._forward_passes.processes.all_gather_object([dict(sums), astuple(worst)])
        found: Sums = defaultdict(float)
        for theirs, their_worst in gathered:
            for name, value in theirs.items():
                found[name] += value
            statistics.worst = max(statistics.worst, WorstRatio(*their_worst), key=lambda one: one.log_ratio)
        for name, value in found.items():
            statistics.sums[name] += value
        return found

    def _policy(
        self, minibatch: Minibatch, rows: Sequence[int], batch: SequenceBatch, tokens: int, sums: Sums
    ) -> WorstRatio:
        """Run forward and backward of the policy loss; returns the largest ratio in these rows."""
        settings, experience = self._settings, minibatch.experience
        width, is_completion = batch.completion_ids.shape[1], batch.is_completion
        with self._models.policy() as model:
            now = self._forward_passes.logprobs(model, batch)
            old, advantages = experience.before.logprobs[rows, :width], experience.advantages[rows, :width]
            policy = policy_loss(now.logprobs, old, advantages, is_completion, clip_range=settings.clip_range)
            loss = policy.loss
            if settings.kl_in == "loss":
                reference = experience.before.reference_logprobs[rows, :width]
                kl = masked_sum(kl_per_token(now.logprobs, reference, settings.kl_estimator), is_completion)
                loss = loss + minibatch.kl_coef * kl
                sums["kl_loss"] += float(kl.detach())
            if settings.entropy_coef:
                loss = loss - settings.entropy_coef * now.entropy.sum()
            (loss / tokens).backward()
        sums["policy_tokens"] += int(is_completion.sum())
        sums["policy_loss"] += float(policy.loss.detach())
        sums["approx_kl"] += float(policy.approx_kl)
        sums["clipped"] += float(policy.clipped)
        sums["ratio"] += float(policy.ratio)
        sums["squared_ratio"] += float(policy.squared_ratio)
        sums["entropy"] += float(now.entropy.detach().sum())
        largest, row = policy.largest_log_ratio.max(dim=0)
        return WorstRatio(float(largest), rows[int(row)], int(policy.largest_position[row]))

    def _critic(self, minibatch: Minibatch, rows: Sequence[int], batch: SequenceBatch, tokens: int, sums: Sums) -> None:
        """Run forward and backward of the critic's loss."""
        settings, experience = self._settings, minibatch.experience
        width = batch.completion_ids.shape[1]
        with self._models.critic() as model:
            critic = value_loss(
                self._forward_passes.values(model, batch),
                experience.before.values[rows, :width],
                experience.returns[rows, :width],
                batch.is_completion,
                clip_range=settings.value_clip_range,
            )
            (settings.value_coef * critic.loss / tokens).backward()
        sums["value_loss"] += float(critic.loss.detach())
        sums["value_clipped"] += float(critic.clipped)

    def _mix_in(self, supervised: SupervisedLoss, optimizer_step: int, statistics: UpdateStatistics) -> None:
        for loss, tokens in self._forward_passes.processes.all_gather_object(supervised.accumulate(optimizer_step)):
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
