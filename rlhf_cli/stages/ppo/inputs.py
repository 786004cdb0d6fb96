"""Inputs of the `ppo` stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rlhf_cli.errors import UsageError
from rlhf_cli.models.reward_model.members import further_members
from rlhf_cli.settings.base import External
from rlhf_cli.settings.rewards import PPORewardSettings
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.inputs import Input, InputFinder, StageInputs
from rlhf_cli.stages.ppo.settings import PPOSettings

_OTHER_REWARDS = ", or use another reward with `--function` or `--reward-url`"


@dataclass(frozen=True)
class PPOInputs(StageInputs):
    """Inputs of PPO.

    Attributes:
        policy: model to start from, and reference of the KL penalty.
        reward_model: reward model; None if only `ppo.rewards` give the reward.
        critic: saved critic to start from; None if `ppo.critic_from` is a keyword.
        prompts: prompt records.
        demonstrations: demonstrations for PPO-ptx.
        rewards: rewards in the order of `ppo.rewards`.
    """

    policy: Input
    reward_model: Input | None
    critic: Input | None
    prompts: Input
    demonstrations: Input | None
    rewards: tuple[Input, ...]


def check_combination(settings: PPOSettings, members: int | None) -> None:
    """Raise `ValueError` for a combination that does nothing, or that adds up the members of an ensemble.

    Args:
        settings: section `ppo`.
        members: number of members of the reward model; None if it is not known yet.
    """
    combination = settings.reward_combination
    if members is not None and members > 1 and combination == "sum":
        raise ValueError(
            f"the reward model is an ensemble of {members} members, and `ppo.reward_combination: sum` would add their "
            "rewards: set it to mean, min or mean-std"
        )
    if members == 1 and not settings.rewards and combination != "sum":
        raise ValueError(
            f"`ppo.reward_combination: {combination}` has no effect without `ppo.rewards` or an ensemble "
            "(`train_rm.members`)"
        )


def find_inputs(settings: PPOSettings, recipe: RunSettings, find: InputFinder) -> PPOInputs:
    """Find the inputs of the stage; raises `UsageError` if one is missing."""
    start = settings.critic_from
    return PPOInputs(
        **find.shared(),
        policy=find.policy("model", settings.model),
        reward_model=_reward_model(settings, recipe, find),
        critic=None if start in External.CRITIC_WORDS else find.named("critic", start, "critic_from"),
        prompts=replace(find.prompts(settings.prompts), use="train"),
        demonstrations=_demonstrations(settings, recipe),
        rewards=tuple(_reward(f"ppo.rewards.{number}", one) for number, one in enumerate(settings.rewards)),
    )


def _reward_model(settings: PPOSettings, recipe: RunSettings, find: InputFinder) -> Input | None:
    if settings.reward_model is not None:
        _check_members(settings, Path(settings.reward_model))
        return find.named("model", settings.reward_model, "reward_model", role="reward model")
    if recipe.value("train_rm") is not None or (not settings.rewards and find.artifacts.has("train-rm")):
        if recipe.value("train_rm") is None:
            _check_members(settings, find.artifacts.folder("train-rm"))
        return find.artifact("train-rm", "reward_model", also=_OTHER_REWARDS)
    if not settings.rewards:
        raise find.missing("train-rm", "reward_model", also=_OTHER_REWARDS)
    if len(settings.rewards) == 1 and settings.reward_combination != "sum":
        raise UsageError(
            f"`ppo.reward_combination: {settings.reward_combination}` has no effect on a single reward",
            hint="remove it, or add another entry to `ppo.rewards` or a reward model",
        )
    return None


def _check_members(settings: PPOSettings, folder: Path) -> None:
    """Check the combination against the members of an ensemble that is there already; raises `UsageError`."""
    try:
        check_combination(settings, 1 + len(further_members(folder)) if folder.is_dir() else None)
    except ValueError as error:
        raise UsageError(str(error), hint="such as `--set ppo.reward_combination=mean`") from None


def _demonstrations(settings: PPOSettings, recipe: RunSettings) -> Input | None:
    if settings.ptx is None:
        return None
    if settings.ptx.data is not None:
        return Input("data", settings.ptx.data, "ppo.ptx.data", records="demonstration", use="train")
    demonstrations = recipe.value("sft.data")
    if demonstrations is None:
        raise UsageError(
            "`ppo.ptx` has no demonstrations: set `ppo.ptx.data` or add an `sft` section",
            hint="specify a file, folder or hub data set with `--set ppo.ptx.data=PATH`",
        )
    return Input("data", demonstrations, "sft.data", records="demonstration", use="train")


def _reward(name: str, reward: PPORewardSettings) -> Input:
    if reward.function is not None:
        return Input("function", reward.function, f"{name}.function")
    if reward.model is not None:
        return Input("model", reward.model, f"{name}.model", role="reward model")
    assert reward.url is not None
    return Input("endpoint", reward.url, f"{name}.url", matters=False, token_env=reward.token_env)
