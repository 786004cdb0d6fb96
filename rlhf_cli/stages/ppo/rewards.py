"""From `ppo.rewards` to one reward: functions, reward models and HTTP endpoints, all given text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_cli.distributed.signals import StopRequest
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.rewards.base import Reward
    from rlhf_cli.rewards.ensemble import CombinedReward
    from rlhf_cli.stages.ppo.model_loading import RewardModelHandle
    from rlhf_cli.stages.ppo.settings import PPORewardSettings, PPOSettings


def build_rewards(
    settings: PPOSettings,
    model: RewardModelHandle | None,
    source: ModelSource,
    template: str | None,
    *,
    stop: StopRequest | None = None,
) -> CombinedReward:
    """The rewards of PPO, combined.

    Args:
        settings: `ppo.rewards` and how they are combined.
        model: the reward model of `ppo.reward_model` or of `train-rm`, whose weight is 1; it comes first.
        source: how the policy is held, and so are further reward models.
        template: of prompts that are plain text, for reward models that do not say.
        stop: asks for signals, for endpoints that keep one waiting.

    Raises:
        RLHFError: a reward that cannot be loaded, or an endpoint whose token is not in the environment.
    """
    from rlhf_cli.rewards.ensemble import CombinedReward
    from rlhf_cli.rewards.reward_model import ModelReward

    members: list[tuple[Reward, float]] = []
    if model is not None:
        members.append((ModelReward("reward-model", model), 1.0))
    members += [(_reward(entry, source, template, stop), entry.weight) for entry in settings.rewards]
    return CombinedReward(members, settings.reward_combination, std_coef=settings.reward_std_coef)


def _reward(entry: PPORewardSettings, source: ModelSource, template: str | None, stop: StopRequest | None) -> Reward:
    if entry.function is not None:
        from rlhf_cli.rewards.python_function import load_scoring_function

        return load_scoring_function(entry.function)
    if entry.model is not None:
        from rlhf_cli.rewards.reward_model import load_model_reward

        return load_model_reward(source.at(entry.model), template=template)
    from rlhf_cli.rewards.http_endpoint import HTTPReward

    assert entry.url is not None
    return HTTPReward(
        entry.url,
        token_env=entry.token_env,
        timeout=entry.timeout,
        retries=entry.retries,
        request_size=entry.request_size,
        stop=stop,
    )
