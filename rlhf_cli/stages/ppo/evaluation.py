"""Looking at the policy while it trains: held-out prompts, and a few fixed ones for people to read."""

from __future__ import annotations

from rlhf_cli.data.records import prompt_text
from rlhf_cli.objectives.kl import kl_per_token
from rlhf_cli.stages.ppo.forward_passes import Answers, ForwardPasses, RolloutTensors
from rlhf_cli.stages.ppo.metrics import answer_kl, rollout_metrics
from rlhf_cli.stages.ppo.options import PPOOptions
from rlhf_cli.stages.ppo.rollout import ProgressCallback, PromptSet, Rollouts
from rlhf_cli.training.monitoring.samples import ShownAnswer

_NUMBER = -1
"""Number of an evaluation's answers: one that no step has, and always the same, so that what changes is the policy."""


class Evaluation:
    """Asks the policy what it is not trained on.

    Args:
        rollouts: asks it.
        engine: forward passes.
        held_out: prompts no step trains on.
        options: settings.
    """

    def __init__(self, rollouts: Rollouts, engine: ForwardPasses, held_out: PromptSet, options: PPOOptions) -> None:
        self._rollouts, self._engine, self._options = rollouts, engine, options
        self._prompts = held_out.first(options.eval_prompts)
        self._fixed = held_out.first(options.shown_prompts)

    def metrics(self, *, kl_coef: float, tell: ProgressCallback) -> dict[str, float]:
        """Metrics of the held-out prompts under `eval/`, each answered once.

        `eval/objective/reward` is the mean of what is trained for: scores with the rules for missing ends and length,
        in the scale they are given in.
        """
        answers, before = self._ask(self._prompts, tell)
        kl = kl_per_token(before.logprobs, before.reference_logprobs, self._options.kl_estimator)
        # A running scale is none to compare policies by; penalties and clip are in the unit of the scaled reward.
        scale = 1.0 if self._options.reward_scale == "running" else self._options.reward_scale
        shape = self._options.shape
        rewards = shape.apply(answers.scores, answers.ended_flags, answers.lengths, scale=scale).to(kl.device)
        found = rollout_metrics(answers, before, rewards, kl, kl_coef=kl_coef)
        found["objective/reward"] = float(rewards.mean())
        return {f"eval/{name}": value for name, value in found.items()}

    def fixed(self, tell: ProgressCallback) -> list[ShownAnswer]:
        """Answers to the fixed prompts."""
        answers, before = self._ask(self._fixed, tell)
        kl = answer_kl(before).tolist()
        return [
            ShownAnswer(
                prompt=prompt_text(answers.prompts[row]),
                answer=answers.texts[row],
                score=float(answers.scores[row]),
                kl=kl[row],
                tokens=len(answers.response_ids[row]),
                ended=answers.ended[row],
            )
            for row in range(len(answers))
        ]

    def _ask(self, prompts: PromptSet, tell: ProgressCallback) -> tuple[Answers, RolloutTensors]:
        rows = range(len(prompts))
        answers = self._rollouts.answers(prompts, rows, [_NUMBER] * len(rows), tell)
        tell("evaluating")
        return answers, self._engine.passes(answers)
