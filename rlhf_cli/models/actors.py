"""Assembling PPO's models from folders: what is shared is decided here, once.

A reward model that was trained as an adapter on the very model the policy starts from joins its backbone; the critic
then starts from it too (summarize-from-feedback's initialisation). Anything else is loaded as a model of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rlhf_cli.data.records import Prompt
from rlhf_cli.data.templates import PromptFormat
from rlhf_cli.models.loading import ModelSource, load_policy, load_tokenizer, recompute_activations
from rlhf_cli.models.roles import SeparateModels, SharedBackbone
from rlhf_cli.models.scorer import Scorer, load_scorer
from rlhf_cli.models.scorer_files import ADAPTER_FOLDER, RewardCard, load_head, read_card
from rlhf_cli.models.scorer_shell import classifier_class, head_of


@dataclass(frozen=True)
class LoraShape:
    """Shape of the adapters PPO trains."""

    rank: int
    alpha: float
    target_modules: str | list[str]


@dataclass(frozen=True)
class RewardModel:
    """A reward model ready to score text, wherever its weights are.

    Attributes:
        scorer: tokenizes, computes and normalises.
        playing: makes the context in which the scorer's weights are the active ones.
        is_shared: its weights are an adapter on the policy's backbone.
    """

    scorer: Scorer
    playing: Callable[[], AbstractContextManager[object]]
    is_shared: bool

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Normalised rewards. The end token is put behind every answer, as in training."""
        with self.playing():
            return self.scorer.score(prompts, completions)


def shared_actors(
    source: ModelSource, lora: LoraShape, *, reward_path: str | None, template: str | None, gradient_checkpointing: bool
) -> tuple[SharedBackbone, RewardModel | None]:
    """One frozen backbone with adapters.

    Args:
        source: the SFT model.
        lora: adapters of policy and critic.
        reward_path: folder or hub id of the reward model, or None.
        template: of prompts that are plain text, for a reward model that does not say its own.
        gradient_checkpointing: recompute activations in the backward pass.
    """
    model = load_policy(source)
    card = _shareable(source, reward_path)
    if card is None:
        roles = SharedBackbone(model, **vars(lora))
        reward = None if reward_path is None else _own_reward(source, reward_path, template)
    else:
        assert reward_path is not None
        folder = Path(reward_path)
        head = _critic_head(folder, card)
        roles = SharedBackbone(model, **vars(lora), reward_adapter=folder / ADAPTER_FOLDER, value_head=head)
        reward = _shared_reward(roles, source, folder, card)
    if gradient_checkpointing:
        recompute_activations(model)
    return roles, reward


def separate_actors(
    source: ModelSource, *, reward_path: str | None, template: str | None, gradient_checkpointing: bool
) -> tuple[SeparateModels, RewardModel | None]:
    """Three full models, and the reward model as a fourth.

    The critic starts from the SFT model with a head that predicts 0.
    """
    # The reference in the policy's own precision: a rounded one would be a KL away at the first step.
    policy, reference, critic = (load_policy(source, dtype=torch.float32) for _ in range(3))
    roles = SeparateModels(policy, reference, critic)
    if gradient_checkpointing:
        recompute_activations(policy)
        recompute_activations(critic)
    return roles, None if reward_path is None else _own_reward(source, reward_path, template)


def _shareable(source: ModelSource, reward_path: str | None) -> RewardCard | None:
    """The reward model's card, if its adapter belongs on the policy's backbone."""
    if reward_path is None or (card := read_card(Path(reward_path))) is None:
        return None
    base = card.base_path(Path(reward_path))
    same = Path(base).resolve() == Path(source.path).resolve() if Path(base).is_dir() else base == source.path
    same = same and card.base_revision == source.revision
    return card if same and card.adapter and card.kind == "decoder" else None


def _own_reward(source: ModelSource, path: str, template: str | None) -> RewardModel:
    scorer = load_scorer(source.at(path), template=template)
    scorer.requires_grad_(False).eval()
    return RewardModel(scorer, nullcontext, is_shared=False)


def _critic_head(folder: Path, card: RewardCard) -> tuple[Tensor, Tensor]:
    """The reward head in the normalised scale: ((w h + b) - mean) / std."""
    head = load_file(folder / "head.safetensors")
    return head["weight"].float() / card.std, (head["bias"].float() - card.mean) / card.std


def _shared_reward(roles: SharedBackbone, source: ModelSource, folder: Path, card: RewardCard) -> RewardModel:
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
    scorer = Scorer(shell, format, source, is_encoder=False)
    scorer.mean, scorer.std = card.mean, card.std
    load_head(scorer, folder)
    return RewardModel(scorer, roles.reward, is_shared=True)
