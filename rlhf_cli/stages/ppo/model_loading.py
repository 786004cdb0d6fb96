"""Assembling PPO's models from folders: what is shared, and what the critic starts from, is decided here, once.

A reward model that was trained as an adapter on the very model the policy starts from joins its backbone. Anything else
is loaded as a model of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Prompt
from rlhf_cli.errors import ModelError
from rlhf_cli.models.loading import (
    ModelSource,
    context_length,
    load_policy,
    load_tokenizer,
    recompute_activations,
)
from rlhf_cli.models.reward_model.classifier import classifier_class, head_of
from rlhf_cli.models.reward_model.files import ADAPTER_FOLDER, RewardModelConfig, load_head
from rlhf_cli.models.reward_model.model import RewardModel, load_reward_model
from rlhf_cli.stages.ppo import critic_initialization as critic_start
from rlhf_cli.stages.ppo.critic import AdapterStart, FullCritic
from rlhf_cli.stages.ppo.critic_initialization import DoesNotFit, shared_reward_config
from rlhf_cli.stages.ppo.models import PPOModels, SeparateModels, SharedBackbone


@dataclass(frozen=True)
class LoraShape:
    """Shape of the adapters PPO trains."""

    rank: int
    alpha: float
    target_modules: str | list[str]


@dataclass(frozen=True)
class PPOModelOptions:
    """How PPO's models are held; the recipe's `ppo` section explains each.

    Attributes:
        lora: adapters of policy and critic; None trains all weights.
        critic: `auto` is an adapter beside a policy that is one.
        critic_from: `auto`, `reward-model`, `policy`, or the folder of a saved critic.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: of new adapters; the same in every process.
        longest: most tokens of a prompt with its answer; None is what the policy reads.
    """

    lora: LoraShape | None
    critic: Literal["auto", "adapter", "separate"] = "auto"
    critic_from: str = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0
    longest: int | None = None

    @property
    def critic_is_adapter(self) -> bool:
        """Whether the critic is an adapter on the policy's backbone."""
        return self.critic == "adapter" or (self.critic == "auto" and self.lora is not None)


@dataclass(frozen=True)
class RewardModelHandle:
    """A reward model ready to score text, wherever its weights are.

    Attributes:
        scorer: tokenizes, computes and normalizes.
        playing: makes the context in which the scorer's weights are the active ones.
        is_shared: its weights are an adapter on the policy's backbone.
    """

    scorer: RewardModel
    playing: Callable[[], AbstractContextManager[object]]
    is_shared: bool

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Normalized rewards. The end token is put behind every answer, as in training."""
        with self.playing():
            return self.scorer.score(prompts, completions)


@dataclass(frozen=True)
class Actors:
    """PPO's models.

    Attributes:
        roles: policy, reference and critic.
        reward_model: None where there is none.
        notes: what is where, a line each, for people.
    """

    roles: PPOModels
    reward_model: RewardModelHandle | None
    notes: tuple[str, ...]


def load_ppo_models(
    source: ModelSource, options: PPOModelOptions, *, reward_path: str | None, template: str | None
) -> Actors:
    """Load PPO's models.

    Args:
        source: the SFT model.
        options: how to hold them.
        reward_path: folder or hub id of the reward model, or None.
        template: of prompts that are plain text, for a reward model that does not say its own.

    Raises:
        ModelError: a model that cannot be loaded, or a critic that cannot start from what it was told to.
    """
    if options.lora is None and options.critic_is_adapter:
        raise ModelError("a critic that is an adapter needs a policy that is one", hint="`--set ppo.critic=separate`")
    # The reference in the policy's own precision: a rounded one would be a KL away at the first step.
    policy = load_policy(source if options.lora is not None else source.in_full())
    critic, note = _critic(source, policy, options, reward_path, template)
    if options.lora is not None:
        roles, reward = _shared(source, policy, options.lora, critic, options.seed, reward_path)
    else:
        assert isinstance(critic, FullCritic)
        roles, reward = SeparateModels(policy, load_policy(source.in_full()), critic), None
    if reward is None and reward_path is not None:
        reward = _own_reward(source, reward_path, template)
    if options.gradient_checkpointing:
        recompute_activations(policy)
        if isinstance(critic, FullCritic):
            with critic.playing() as model:
                recompute_activations(model)
    return Actors(roles, reward, (_layout_note(options, reward), note))


def _shared(
    source: ModelSource,
    policy: PreTrainedModel,
    lora: LoraShape,
    critic: AdapterStart | FullCritic,
    seed: int,
    reward_path: str | None,
) -> tuple[SharedBackbone, RewardModelHandle | None]:
    """Models on one backbone, and the reward model if it is an adapter on it too."""
    folder, card = Path(reward_path or ""), shared_reward_config(source, reward_path)
    roles = SharedBackbone(
        policy,
        **vars(lora),
        seed=seed,
        reward_adapter=None if card is None else folder / ADAPTER_FOLDER,
        critic=critic,
        source=source,
    )
    return roles, None if card is None else _shared_reward(roles, source, folder, card)


def _critic(
    source: ModelSource,
    policy: PreTrainedModel,
    options: PPOModelOptions,
    reward_path: str | None,
    template: str | None,
) -> tuple[AdapterStart | FullCritic, str]:
    """The critic, or the adapter it is to start from, and a line that says which it is."""
    longest = context_length(policy.config) if options.longest is None else options.longest
    asked = options.critic_from
    aside = ""
    if asked in ("auto", "reward-model"):
        try:
            if options.critic_is_adapter:
                found = critic_start.adapter_from_reward(source, reward_path)
            else:
                found = critic_start.model_from_reward(source, policy, reward_path, template=template, longest=longest)
            return found, "the critic starts from the reward model"
        except DoesNotFit as reason:
            if asked == "reward-model":
                raise _refused(reason, options) from reason
            aside = f": {reason}" if reward_path is not None else ""
    elif asked != "policy":
        return _saved_critic(source, policy, options, Path(asked), longest), f"the critic starts from {asked}"
    note = f"the critic starts from the policy, with values of 0{aside}"
    return AdapterStart() if options.critic_is_adapter else critic_start.model_from_policy(source), note


def _refused(reason: DoesNotFit, options: PPOModelOptions) -> ModelError:
    hint = "start the critic from the policy: `--set ppo.critic_from=policy`"
    if options.critic_is_adapter:
        hint += "; a reward model of another kind can be a critic of its own: `--set ppo.critic=separate`"
    return ModelError(f"the critic cannot start from the reward model: {reason}", hint=hint)


def _saved_critic(
    source: ModelSource, policy: PreTrainedModel, options: PPOModelOptions, folder: Path, longest: int
) -> AdapterStart | FullCritic:
    if options.critic_is_adapter:
        return critic_start.adapter_from_folder(source, folder)
    try:
        return critic_start.model_from_folder(source, policy, folder, longest=longest)
    except DoesNotFit as reason:
        raise ModelError(f"the critic cannot start so: {reason}", hint="`--set ppo.critic_from=policy`") from reason


def _layout_note(options: PPOModelOptions, reward: RewardModelHandle | None) -> str:
    place = "no model" if reward is None else ("an adapter on it too" if reward.is_shared else "a model of its own")
    if options.lora is None:
        return "policy, reference and critic are separate models, all weights trained"
    if options.critic_is_adapter:
        return f"policy, critic and reference share one backbone; the reward is {place}"
    return f"policy and reference share one backbone, the critic is a model of its own; the reward is {place}"


def _own_reward(source: ModelSource, path: str, template: str | None) -> RewardModelHandle:
    scorer = load_reward_model(source.at(path), template=template)
    scorer.requires_grad_(False).eval()
    return RewardModelHandle(scorer, nullcontext, is_shared=False)


def _shared_reward(
    roles: SharedBackbone, source: ModelSource, folder: Path, card: RewardModelConfig
) -> RewardModelHandle:
    """A scorer on the policy's backbone: its classifier is built without weights, then given that backbone."""
    model = roles.model
    config = type(model.config).from_dict(model.config.to_dict() | {"num_labels": 1})
    kind = classifier_class(config, source.path)
    with torch.device("meta"):
        shell = kind.from_config(config) if kind is AutoModelForSequenceClassification else kind(config)
    setattr(shell, shell.base_model_prefix, model.base_model)
    head = head_of(shell, source.path)
    head.weight = nn.Parameter(torch.zeros(head.weight.shape, device=model.device), requires_grad=False)
    format = PromptFormat(load_tokenizer(source.at(str(folder))), card.template, name=f"`{folder}`")
    scorer = RewardModel(shell, format, source, is_encoder=False)
    scorer.mean, scorer.std = card.mean, card.std
    load_head(scorer, folder)
    return RewardModelHandle(scorer, roles.reward, is_shared=True)
