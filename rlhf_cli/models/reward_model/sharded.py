"""Reward models whose weights are divided among the processes (`model.sharding: fsdp`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rlhf_cli.models.loading import ModelSource, recompute_activations
from rlhf_cli.models.reward_model.classifier import open_classifier
from rlhf_cli.models.reward_model.files import read_reward_config, refuse_adapter_as_start
from rlhf_cli.models.reward_model.model import RewardModel, add_reward_adapter, reward_model_on
from rlhf_cli.models.seeding import seeded
from rlhf_cli.models.sharding import whole
from rlhf_cli.settings.shared import LoraSettings


def new_sharded_reward_model(
    source: ModelSource,
    *,
    template: str | None,
    template_kwargs: Mapping[str, Any] | None = None,
    lora: LoraSettings | None,
    seed: int = 0,
    gradient_checkpointing: bool = False,
) -> RewardModel:
    """Make the reward model of `new_reward_model` whose weights are divided among the processes; all call this.

    Raises:
        ModelError: see `new_reward_model` and `open_classifier`.
    """
    refuse_adapter_as_start(source.path, read_reward_config(source.folder))
    with seeded(seed, source.device):
        classifier, unread = open_classifier(source, dtype=None if lora else torch.float32)
        if lora is not None:
            add_reward_adapter(classifier, lora)
    unread.read(rounds=lora is None)
    if gradient_checkpointing:
        recompute_activations(classifier.model)
    return reward_model_on(classifier, source, template, template_kwargs or {})


@torch.no_grad()
def copy_weights(target: RewardModel | None, trained: RewardModel) -> None:
    """Copy trained weights, bias and scale of a sharded reward model into a whole one.

    Args:
        target: made from the same model with the same settings; None in processes that get no copy.
        trained: every process calls this with its own.
    """
    weights = {} if target is None else dict(target.named_parameters())
    for name, weight in trained.named_parameters():
        if weight.requires_grad:
            value = whole(weight)
            if target is not None:
                weights[name].copy_(value)
    if target is not None:
        target.bias.copy_(trained.bias)
        target.mean, target.std = trained.mean, trained.std
