"""What the evaluation reads."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.errors import UsageError
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.evaluate.settings import EvaluateSettings
from rlhf_cli.stages.inputs import Input, InputFinder, StageInputs


@dataclass(frozen=True)
class EvaluateInputs(StageInputs):
    """Inputs of the evaluation.

    Attributes:
        baseline: model to compare with.
        policy: model under evaluation.
        reward_model: whose mean reward is reported, if any.
        judge_function: decides which completion wins; without it the reward model does.
        prompts: prompt records.
    """

    baseline: Input
    policy: Input
    reward_model: Input | None
    judge_function: Input | None
    prompts: Input


def find_inputs(settings: EvaluateSettings, recipe: RunSettings, find: InputFinder) -> EvaluateInputs:
    """Inputs of the stage; raises `UsageError` for one that is missing."""
    # The baseline is what PPO started from, unless a setting names another: KL and wins are then due to PPO alone.
    baseline = find.policy("baseline", settings.baseline or recipe.value("ppo.model"))
    policy = find.named("model", settings.policy, "policy") or find.artifact("ppo", "policy")
    reward_model = _reward_model(settings, recipe, find)
    if reward_model is None and settings.judge_function is None:
        raise UsageError(
            "`evaluate` has nothing to judge by: no reward model and no `evaluate.judge_function`",
            hint="name one with `--set evaluate.judge_function=FILE.py:FUNCTION` or `evaluate.reward_model=PATH`",
        )
    return EvaluateInputs(
        **find.shared(loads_model=True),
        baseline=baseline,
        policy=policy,
        reward_model=reward_model,
        judge_function=find.named("function", settings.judge_function, "judge_function"),
        prompts=find.prompts(settings.prompts),
    )


def _reward_model(settings: EvaluateSettings, recipe: RunSettings, find: InputFinder) -> Input | None:
    if settings.reward_model is not None:
        return find.named("model", settings.reward_model, "reward_model")
    if recipe.value("train_rm") is None and (of_ppo := recipe.value("ppo.reward_model")) is not None:
        return Input("model", of_ppo, "ppo.reward_model")
    return find.artifact("train-rm", "reward_model") if find.artifacts.has("train-rm") else None
