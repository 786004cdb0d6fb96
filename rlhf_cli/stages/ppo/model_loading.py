"""Load PPO's models and decide what they share and where the critic starts.

A reward model trained as an adapter on the model the policy starts from shares the policy's backbone. Any other reward
model is loaded as a separate model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Prompt
from rlhf_cli.errors import ModelError
from rlhf_cli.memory import free_memory
from rlhf_cli.models.idle_weights import IdleWeights, idle_weights
from rlhf_cli.models.loading import ModelSource, context_length, load_policy, load_tokenizer, recompute_activations
from rlhf_cli.models.reward_model.classifier import classifier_class, head_of
from rlhf_cli.models.reward_model.files import ADAPTER_FOLDER, RewardModelConfig, load_head
from rlhf_cli.models.reward_model.loading import load_reward_model
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.models.reward_model.sharded import load_divided
from rlhf_cli.models.sharded_loading import UnreadModel, open_policy
from rlhf_cli.models.sharding import share_shards
from rlhf_cli.models.split_weights import round_weights, split_weights
from rlhf_cli.stages.ppo import critic_initialization as critic_start
from rlhf_cli.stages.ppo.critic import AdapterStart, FullCritic, HeadStart
from rlhf_cli.stages.ppo.critic_initialization import DoesNotFit, shared_reward_config
from rlhf_cli.stages.ppo.models import PPOModels, SeparateModels, SharedBackbone, used
from rlhf_cli.stages.ppo.settings import PPOSettings


@dataclass(frozen=True)
class RewardModelHandle:
    """A reward model that can score text at any time, even if its weights are an adapter on the policy's backbone.

    Attributes:
        model: the reward model.
        activate: returns a context inside which the reward model's weights are the active ones.
        is_shared: the weights are an adapter on the policy's backbone.
    """

    model: RewardModel
    activate: Callable[[], AbstractContextManager[object]]
    is_shared: bool

    @property
    def is_sharded(self) -> bool:
        """Whether all processes score together."""
        return self.model.is_sharded

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Return normalized rewards; an end token follows every completion, as in training."""
        with self.activate():
            return self.model.score(prompts, completions)


@dataclass(frozen=True)
class LoadedPPOModels:
    """The models of a PPO run.

    Attributes:
        models: policy, reference and critic.
        reward_model: None if the run has none.
        notes: lines for people that say what is shared and where the critic starts.
    """

    models: PPOModels
    reward_model: RewardModelHandle | None
    notes: tuple[str, ...]


def load_ppo_models(
    source: ModelSource,
    settings: PPOSettings,
    *,
    reward_path: str | None,
    template: str | None,
    seed: int = 0,
    longest: int | None = None,
    scratch: Path | None = None,
    is_sharded: bool = False,
) -> LoadedPPOModels:
    """Load policy, reference, critic and reward model.

    Args:
        source: the SFT model.
        settings: of PPO; adapters, critic and gradient checkpointing are read here.
        reward_path: folder or hub id of the reward model, or None.
        template: template of plain-text prompts, for a reward model that does not record one.
        seed: of new adapters; the same in every process.
        longest: maximum tokens of a prompt with its completion; None is the context length of the policy.
        scratch: folder for the weights of models that rest during updates, see `models.idle_weights`; None keeps them
            in memory.
        is_sharded: divide all models among the processes; every process then calls this.

    Raises:
        ModelError: a model cannot be loaded, or the critic cannot start from `settings.critic_from`.
    """
    is_lora = settings.adapter == "lora"
    # Trained in full, the policy is float32. Its reference must be too: rounded weights would differ from the policy
    # by a KL of more than 0 at the first step.
    unread = open_policy(source if is_lora else source.in_full()) if is_sharded else None
    policy = load_policy(source if is_lora else source.in_full()) if unread is None else unread.model
    longest = context_length(policy.config) if longest is None else longest
    critic, note = _critic(source, policy, settings, reward_path, longest, is_sharded=is_sharded)
    reward = None
    if is_lora:
        models, reward = _on_shared_backbone(source, policy, settings, critic, seed, reward_path, unread)
    elif unread is not None:
        models = _separate_sharded(source, unread, critic)
    else:
        models = _separate(source, policy, critic, settings, scratch)
    if isinstance(critic, FullCritic) and source.precision != torch.float32 and not is_sharded:
        with critic.active_model() as model:
            split_weights(model)
    if reward is None and reward_path is not None:
        reward = _separate_reward(source, reward_path, template, settings, scratch, is_sharded=is_sharded)
    if settings.gradient_checkpointing:
        recompute_activations(policy)
        if isinstance(critic, FullCritic):
            with critic.active_model() as model:
                recompute_activations(model)
    free_memory()  # tensors that were read in other precisions
    notes = [_layout_note(settings, reward), note]
    if settings.offload_frozen and is_lora and (reward is None or reward.is_shared):
        notes.append("`ppo.offload_frozen` has no effect: neither reference nor reward model is a model of its own")
    return LoadedPPOModels(models, reward, tuple(notes))


def _on_shared_backbone(
    source: ModelSource,
    policy: PreTrainedModel,
    settings: PPOSettings,
    critic: AdapterStart | HeadStart | FullCritic,
    seed: int,
    reward_path: str | None,
    unread: UnreadModel | None,
) -> tuple[SharedBackbone, RewardModelHandle | None]:
    """Put the adapters on the policy's backbone, with the reward model's if it was trained on this backbone.

    Weights that are not read yet are read then, into shards.
    """
    config = shared_reward_config(source, reward_path)
    folder = Path() if config is None else source.at(reward_path or "").folder
    models = SharedBackbone(
        policy,
        settings.lora,
        seed=seed,
        reward_adapter=None if config is None else folder / ADAPTER_FOLDER,
        critic=critic,
        source=source,
    )
    if unread is not None:
        unread.read()
        models.value_head.to(source.device)
    return models, None if config is None else _shared_reward(models, source, folder, config)


def _separate(
    source: ModelSource,
    policy: PreTrainedModel,
    critic: AdapterStart | HeadStart | FullCritic,
    settings: PPOSettings,
    scratch: Path | None,
) -> SeparateModels:
    """Load the reference beside a policy that is trained in full."""
    assert isinstance(critic, FullCritic | HeadStart)
    reference = load_policy(source.in_full()).requires_grad_(False)
    if source.precision != torch.float32:
        split_weights(policy)
        round_weights(reference)  # as the policy is, so that their KL is 0 at the first step
    return SeparateModels(policy, reference, critic, idle=_idle(reference, settings, scratch))


def _separate_sharded(
    source: ModelSource, policy: UnreadModel, critic: AdapterStart | HeadStart | FullCritic
) -> SeparateModels:
    """Read policy and reference into shards; a critic that is a model is there."""
    assert isinstance(critic, FullCritic | HeadStart)
    policy.model.requires_grad_(True)
    reference = open_policy(source.in_full())
    reference.model.requires_grad_(False)
    return SeparateModels(policy.read(rounds=True), reference.read(rounds=True), critic)


def _critic(
    source: ModelSource,
    policy: PreTrainedModel,
    settings: PPOSettings,
    reward_path: str | None,
    longest: int,
    *,
    is_sharded: bool,
) -> tuple[AdapterStart | HeadStart | FullCritic, str]:
    """Return the critic, or the start of its adapter or head, and a line that says where it starts."""
    start, is_adapter = settings.critic_from, settings.critic_is_adapter
    if settings.critic == "head":
        if start in ("auto", "policy"):
            return HeadStart(), "the critic's head predicts 0"
        head = critic_start.head_from_folder(Path(start), is_sharded=is_sharded)
        return head, f"the critic starts from {start}"
    fallback_reason = ""
    if start in ("auto", "reward-model"):
        try:
            if is_adapter:
                critic = critic_start.adapter_from_reward(source, reward_path, is_sharded=is_sharded)
            else:
                critic = critic_start.model_from_reward(
                    source, policy, reward_path, longest=longest, is_sharded=is_sharded
                )
            return critic, "the critic starts from the reward model"
        except DoesNotFit as reason:
            if start == "reward-model":
                raise _cannot_start(reason, settings) from reason
            fallback_reason = f": {reason}" if reward_path is not None else ""
    elif start != "policy":
        saved = _saved_critic(source, policy, settings, longest, is_sharded=is_sharded)
        return saved, f"the critic starts from {start}"
    note = f"the critic starts from the policy and predicts 0{fallback_reason}"
    if is_adapter:
        return AdapterStart(), note
    return critic_start.model_from_policy(source, is_sharded=is_sharded), note


def _cannot_start(reason: DoesNotFit, settings: PPOSettings) -> ModelError:
    hint = "start the critic from the policy: `--set ppo.critic_from=policy`"
    if settings.critic_is_adapter:
        hint += "; or make the critic a separate model: `--set ppo.critic=separate`"
    return ModelError(f"the critic cannot start from the reward model: {reason}", hint=hint)


def _saved_critic(
    source: ModelSource, policy: PreTrainedModel, settings: PPOSettings, longest: int, *, is_sharded: bool
) -> AdapterStart | FullCritic:
    folder = Path(settings.critic_from)
    if settings.critic_is_adapter:
        return critic_start.adapter_from_folder(source, folder, is_sharded=is_sharded)
    try:
        return critic_start.model_from_folder(source, policy, folder, longest=longest, is_sharded=is_sharded)
    except DoesNotFit as reason:
        raise ModelError(
            f"the critic cannot start from {folder}: {reason}", hint="`--set ppo.critic_from=policy`"
        ) from reason


def _layout_note(settings: PPOSettings, reward: RewardModelHandle | None) -> str:
    if settings.adapter == "none":
        if settings.critic == "head":
            return "policy and reference are separate models, the critic is a head on the policy"
        return "policy, reference and critic are separate models, trained in full"
    shared = "policy, critic and reference share one backbone"
    if not settings.critic_is_adapter:
        critic = "a head on the policy" if settings.critic == "head" else "a separate model"
        shared = f"policy and reference share one backbone, the critic is {critic}"
    if reward is None:
        return f"{shared}; there is no reward model"
    return f"{shared}; the reward model is {'an adapter on it too' if reward.is_shared else 'a separate model'}"


def _separate_reward(
    source: ModelSource,
    path: str,
    template: str | None,
    settings: PPOSettings,
    scratch: Path | None,
    *,
    is_sharded: bool,
) -> RewardModelHandle:
    model = (load_divided if is_sharded else load_reward_model)(source.at(path), template=template)
    idle = None if model.is_sharded else _idle(model, settings, scratch)
    return RewardModelHandle(model, partial(used, model, idle), is_shared=False)


def _idle(model: nn.Module, settings: PPOSettings, scratch: Path | None) -> IdleWeights | None:
    idle = idle_weights(model, scratch, offloads=settings.offload_frozen)
    if idle is not None:
        free_memory()
    return idle


def _shared_reward(
    models: SharedBackbone, source: ModelSource, folder: Path, config: RewardModelConfig
) -> RewardModelHandle:
    """Build a reward model on the policy's backbone: a classifier without weights of its own except the head."""
    backbone = models.model
    architecture = type(backbone.config).from_dict(backbone.config.to_dict() | {"num_labels": 1})
    kind = classifier_class(architecture, source.path)
    with torch.device("meta"):
        classifier = (
            kind.from_config(architecture) if kind is AutoModelForSequenceClassification else kind(architecture)
        )
    setattr(classifier, classifier.base_model_prefix, backbone.base_model)
    head = head_of(classifier, source.path)
    head.weight = nn.Parameter(torch.zeros(head.weight.shape, device=backbone.device), requires_grad=False)
    format = PromptFormat(
        load_tokenizer(source.at(str(folder))),
        config.template,
        name=f"`{folder}`",
        template_kwargs=config.template_kwargs,
    )
    reward_model = RewardModel(classifier, format, source, is_encoder=False)
    reward_model.mean, reward_model.std = config.mean, config.std
    load_head(reward_model, folder)
    share_shards(classifier, backbone)
    return RewardModelHandle(reward_model, models.reward, is_shared=True)
