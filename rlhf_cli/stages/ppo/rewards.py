"""Build the combined reward of PPO from `ppo.rewards`: functions, reward models and HTTP endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.errors import UsageError

if TYPE_CHECKING:
    from rlhf_cli.distributed.signals import StopRequest
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.rewards.base import Reward
    from rlhf_cli.rewards.ensemble import CombinedReward
    from rlhf_cli.settings.rewards import PPORewardSettings
    from rlhf_cli.stages.ppo.model_loading import RewardModelHandle
    from rlhf_cli.stages.ppo.settings import PPOSettings


def build_rewards(
    settings: PPOSettings,
    model: RewardModelHandle | None,
    source: ModelSource,
    template: str | None,
    *,
    members: Sequence[Path] = (),
    stop: StopRequest | None = None,
    is_sharded: bool = False,
) -> CombinedReward:
    """Load the rewards of PPO and combine them.

    Args:
        settings: `ppo.rewards` and their combination.
        model: reward model of `ppo.reward_model` or of `train-rm`; it comes first, with weight 1.
        source: of the policy; further reward models use its device and precisions.
        template: template of plain-text prompts, for reward models that do not record their own.
        members: folders of the other members of an ensemble, whose first member is `model`; each with weight 1.
        stop: ends the wait for an endpoint that does not respond.
        is_sharded: divide reward models among the processes.

    Raises:
        RLHFError: a reward cannot be loaded, or the token of an endpoint is not in the environment.
    """
    from rlhf_cli.rewards.ensemble import CombinedReward
    from rlhf_cli.rewards.reward_model import ModelReward, load_model_reward

    rewards: list[tuple[Reward, float]] = []
    if model is not None:
        rewards.append((ModelReward("reward-model", model), 1.0))
    for folder in members:
        loaded = load_model_reward(source.at(str(folder)), template=template, is_sharded=is_sharded)
        rewards.append((ModelReward(f"reward-model-{folder.name}", loaded.model), 1.0))
    rewards += [(_reward(entry, source, template, stop, is_sharded), entry.weight) for entry in settings.rewards]
    if not any(weight for _, weight in rewards):
        raise UsageError(
            "`ppo` has no reward to train on: every reward of `ppo.rewards` has weight 0, with which it is only logged",
            hint="give one of them a weight, or name a reward model with `--set ppo.reward_model=PATH`",
        )
    return CombinedReward(rewards, settings.reward_combination, std_coef=settings.reward_std_coef)


def _reward(
    entry: PPORewardSettings, source: ModelSource, template: str | None, stop: StopRequest | None, is_sharded: bool
) -> Reward:
    if entry.function is not None:
        from rlhf_cli.rewards.python_function import load_scoring_function

        return load_scoring_function(entry.function)
    if entry.model is not None:
        from rlhf_cli.rewards.reward_model import load_model_reward

        return load_model_reward(source.at(entry.model), template=template, is_sharded=is_sharded)
    from rlhf_cli.rewards.http_endpoint import HTTPReward

    return HTTPReward(entry, stop=stop)
