"""Evaluation of the policy during training: on held-out prompts, and on a few fixed ones for people to read."""

from __future__ import annotations

from rlhf_cli.data.records import prompt_text
from rlhf_cli.generation.prompts import TokenizedPrompts
from rlhf_cli.objectives.shaping import RewardShape
from rlhf_cli.stages.ppo.forward_passes import Completions, ForwardPasses, RolloutTensors
from rlhf_cli.stages.ppo.metrics import completion_kl, rollout_metrics
from rlhf_cli.stages.ppo.rollout import Rollouts
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.training.monitoring.samples import ShownCompletion
from rlhf_cli.training.timing import StepWatch

_NUMBER = -1
"""Sample number of an evaluation's completions. No step has it, and it never changes, so that only the policy does."""


def reward_shape(settings: PPOSettings) -> RewardShape:
    """Return how scores become rewards."""
    return RewardShape(
        settings.reward_clip, settings.missing_eos_reward, settings.missing_eos_penalty, settings.length_penalty
    )


class Evaluation:
    """Samples completions of prompts that the policy is not trained on.

    Args:
        rollouts: sample and score.
        forward_passes: forward passes.
        held_out: prompts that no step trains on.
        settings: section `ppo` of the recipe.
    """

    def __init__(
        self, rollouts: Rollouts, forward_passes: ForwardPasses, held_out: TokenizedPrompts, settings: PPOSettings
    ) -> None:
        self._rollouts, self._forward_passes, self._settings = rollouts, forward_passes, settings
        self._prompts = held_out.first(settings.eval_prompts)
        self._fixed = held_out.first(settings.shown_prompts)

    def metrics(self, *, kl_coef: float, watch: StepWatch) -> dict[str, float]:
        """Return metrics of the held-out prompts under `eval/`, with one completion per prompt.

        `eval/objective/reward` is the mean of what is trained for: scores with the rules for missing ends and length,
        on the scale they are given in.
        """
        completions, before = self._sample(self._prompts, watch)
        # Policies cannot be compared on a running scale; penalties and clip are in units of the scaled reward.
        scale = 1.0 if self._settings.reward_scale == "running" else self._settings.reward_scale
        shape = reward_shape(self._settings)
        rewards = shape.apply(completions.scores, completions.finished_flags, completions.lengths, scale=scale)
        found = rollout_metrics(completions, before, rewards, kl_coef=kl_coef)
        found["objective/reward"] = float(rewards.mean())
        return {f"eval/{name}": value for name, value in found.items()}

    def fixed(self, watch: StepWatch) -> list[ShownCompletion]:
        """Return completions of the fixed prompts."""
        completions, before = self._sample(self._fixed, watch)
        kl = completion_kl(before).tolist()
        return [
            ShownCompletion(
                prompt=prompt_text(completions.prompts[row]),
                completion=completions.texts[row],
                score=float(completions.scores[row]),
                kl=kl[row],
                tokens=len(completions.completion_ids[row]),
                ended=completions.finished[row],
            )
            for row in range(len(completions))
        ]

    def _sample(self, prompts: TokenizedPrompts, watch: StepWatch) -> tuple[Completions, RolloutTensors]:
        rows = range(len(prompts))
        with watch.phase("eval", "evaluating"):
            completions = self._rollouts.completions(prompts, rows, [_NUMBER] * len(rows), watch)
            return completions, self._forward_passes.rollout_tensors(completions)
