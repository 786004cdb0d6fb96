"""Inputs of the `evaluate` stage."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf_cli.errors import UsageError
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.evaluate.settings import EvaluateSettings
from rlhf_cli.stages.inputs import Input, InputFinder, StageInputs
from rlhf_cli.stages.panel import judge_inputs


@dataclass(frozen=True)
class EvaluateInputs(StageInputs):
    """Inputs of evaluation.

    Attributes:
        baseline: model to compare with.
        policy: model to evaluate.
        policies: further models to evaluate.
        reward_model: reward model whose mean reward is reported, if any.
        judge_function: function that decides which completion wins; without it the reward model decides.
        prompts: prompt records.
        demonstrations: demonstrations to measure perplexity on, if any.
        judges: judges in the order of `evaluate.judge.panel`.
        rubric: file with the rubric of the judges.
        calibration: human rankings that judges are compared with.
    """

    baseline: Input
    policy: Input
    policies: tuple[Input, ...]
    reward_model: Input | None
    judge_function: Input | None
    prompts: Input
    demonstrations: Input | None
    labels: Input | None = None
    judges: tuple[Input, ...] = ()
    rubric: Input | None = None
    calibration: Input | None = None

    @property
    def evaluated(self) -> tuple[Input, ...]:
        """All models that are compared with the baseline."""
        return (self.policy, *self.policies)


def find_inputs(settings: EvaluateSettings, recipe: RunSettings, find: InputFinder) -> EvaluateInputs:
    """Find the inputs of the stage; raises `UsageError` if one is missing."""
    # By default the baseline is the model PPO started from, so that KL and wins measure the effect of PPO.
    baseline = find.policy("baseline", settings.baseline or recipe.value("ppo.model"))
    policies = [
        find.named("model", one.model, f"policies.{number}.model", role="policy")
        for number, one in enumerate(settings.policies)
    ]
    evaluated = [one for one in [_policy(settings, find), *policies] if one is not None]
    reward_model = _reward_model(settings, recipe, find)
    if reward_model is None and settings.decided_by == "reward model":
        raise UsageError(
            "`evaluate` has neither a reward model nor `evaluate.judge_function` nor `evaluate.judge`",
            hint="use `--set evaluate.judge_function=FILE.py:FUNCTION` or `--set evaluate.reward_model=PATH`",
        )
    if reward_model is None and any(one.best_of > 1 for one in settings.policies):
        raise UsageError(
            "`best_of` of `evaluate.policies` takes the best by a reward model, and there is none",
            hint="use `--set evaluate.reward_model=PATH`, or remove `best_of`",
        )
    return EvaluateInputs(
        **find.shared(),
        baseline=baseline,
        policy=evaluated[0],
        policies=tuple(evaluated[1:]),
        reward_model=reward_model,
        judge_function=find.named("function", settings.judge_function, "judge_function"),
        prompts=replace(find.prompts(settings.prompts), use=None if settings.prompts is None else "evaluate"),
        demonstrations=find.named("data", settings.demonstrations, "demonstrations", records="demonstration"),
        labels=find.named("data", settings.labels, "labels", records="ranking"),
        **judge_inputs(settings.judge, "evaluate", find),
    )


def _policy(settings: EvaluateSettings, find: InputFinder) -> Input | None:
    """Return the model of `evaluate.policy`, else the output of `ppo`; None if only `evaluate.policies` are left."""
    if settings.policy is None and settings.policies and not find.artifacts.has("ppo"):
        return None
    return find.named("model", settings.policy, "policy", role="policy") or find.artifact("ppo", "policy")


def _reward_model(settings: EvaluateSettings, recipe: RunSettings, find: InputFinder) -> Input | None:
    if settings.reward_model is not None:
        return find.named("model", settings.reward_model, "reward_model", role="reward model")
    if recipe.value("train_rm") is None and (of_ppo := recipe.value("ppo.reward_model")) is not None:
        return Input("model", of_ppo, "ppo.reward_model", role="reward model")
    return find.artifact("train-rm", "reward_model") if find.artifacts.has("train-rm") else None
