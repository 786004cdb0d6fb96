"""What the phases of a PPO step do, in tokens and floating-point operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rlhf_cli.generation.length_estimate import LengthEstimate
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.prompts import TokenizedPrompts
from rlhf_cli.stages.ppo.forward_passes import Completions
from rlhf_cli.stages.ppo.models import PPOModels
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.ppo.update import UpdateStatistics
from rlhf_cli.training.flops import ModelSize, model_size
from rlhf_cli.training.monitoring.timing_log import Work

ALIKE = ("passes", "update")
"""Phases in which models pass over all tokens of a step: one of them tells how long the other takes."""
_SAMPLED = 10.0
"""Time to sample a token, in units of the time that a forward pass takes per token."""


def relative_durations(settings: PPOSettings, policy: Policy, prompts: TokenizedPrompts) -> dict[str, float]:
    """Return a guess of the phases' relative durations, for the time left before the first step has ended.

    Forward passes are the unit: three models pass in `passes`, or two where the critic is a head on the policy. In an
    update, policy and critic go forward and backward, which takes three times a forward pass. In a rollout the prompts
    are passed over, and the tokens of completions are sampled one after another.
    """
    trained = 1.0 if settings.critic_is_head else 2.0
    completion = LengthEstimate(policy.sampling.max_new_tokens).remaining()
    prompt = fmean(map(len, prompts.ids)) if len(prompts) else completion
    rollout = (prompt + _SAMPLED * completion) / (prompt + completion)
    return {"rollout": rollout, "scoring": 0.5, "passes": 1.0 + trained, "update": 3.0 * trained * settings.epochs}


@dataclass(frozen=True)
class StepFlops:
    """The models of PPO, as their operations depend on them; see `training.flops`.

    `critic_is_head`: the critic reads the hidden states of the policy's own pass.
    """

    policy: ModelSize
    reference: ModelSize
    critic: ModelSize
    critic_is_head: bool = False

    @staticmethod
    def of(models: PPOModels) -> StepFlops | None:
        """Return the sizes of the models; None where one is not known."""
        with models.policy() as model:
            policy = model_size(model, models.policy_parameters())
        with models.reference() as model:
            reference = model_size(model)
        with models.critic() as model:
            critic = model_size(model, models.critic_parameters(), has_vocabulary=False)
        if policy is None or reference is None or critic is None:
            return None
        return StepFlops(policy, reference, critic, models.critic_is_head)

    def rollout(self, lengths: Sequence[int]) -> float:
        """Return the operations of sampling sequences, prompts included."""
        return self.policy.forward(lengths)

    def passes(self, lengths: Sequence[int]) -> float:
        """Return the operations of the passes before the update."""
        sizes = (self.policy, self.reference) if self.critic_is_head else (self.policy, self.reference, self.critic)
        return sum(size.forward(lengths) for size in sizes)

    def update(self, lengths: Sequence[int], *, policy_epochs: float, critic_epochs: float) -> float:
        """Return the operations of an update; epochs may be parts."""
        learned = policy_epochs * self.policy.training(lengths)
        if self.critic_is_head:  # trained in the policy's pass; in the warm-up the gradient ends at the head
            return learned + (critic_epochs - policy_epochs) * self.critic.forward(lengths)
        return learned + critic_epochs * self.critic.training(lengths)


def step_work(completions: Completions, update: UpdateStatistics, flops: StepFlops | None) -> Mapping[str, Work]:
    """Return what the phases of a step did: completion tokens sampled, tokens of prompts and completions passed and
    trained. Rewards and the demonstrations of PPO-ptx are not counted.
    """
    pairs = zip(completions.prompt_ids, completions.completion_ids, strict=True)
    lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
    drawn = sum(len(ids) for ids in completions.completion_ids)
    critic_epochs = update.sums["tokens"] / drawn  # fewer where the update ended early
    policy_epochs = update.sums["policy_tokens"] / drawn
    trained = round(critic_epochs * sum(lengths))
    if flops is None:
        return {"rollout": Work(drawn), "passes": Work(sum(lengths)), "update": Work(trained)}
    learned = flops.update(lengths, policy_epochs=policy_epochs, critic_epochs=critic_epochs)
    return {
        "rollout": Work(drawn, flops.rollout(lengths)),
        "passes": Work(sum(lengths), flops.passes(lengths)),
        "update": Work(trained, learned),
    }
