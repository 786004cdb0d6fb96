"""Reward models whose weights are divided among the processes (`model.sharding: fsdp`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from rlhf_cli.distributed.agreement import agreed
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.models.adapter_files import load_adapter
from rlhf_cli.models.loading import ModelSource, recompute_activations
from rlhf_cli.models.reward_model.classifier import check_has_head, head_parameters, open_classifier
from rlhf_cli.models.reward_model.files import (
    ADAPTER_FOLDER,
    load_head,
    read_reward_config,
    refuse_adapter_as_start,
)
from rlhf_cli.models.reward_model.loading import (
    add_reward_adapter,
    frozen_reward_model,
    load_reward_model,
    reward_model_on,
)
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.models.seeding import seeded
from rlhf_cli.models.sharded_loading import NotShardedError, UnreadModel
from rlhf_cli.progress import say_once
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
        dtype = None if lora else torch.float32
        classifier, unread = agreed(lambda: open_classifier(source, dtype=dtype), ProcessGroup(source.device))
        if lora is not None:
            add_reward_adapter(classifier, lora)
    unread.read(rounds=lora is None)
    if gradient_checkpointing:
        recompute_activations(classifier.model)
    return reward_model_on(classifier, source, template, template_kwargs or {})


def load_divided(source: ModelSource, *, template: str | None) -> RewardModel:
    """Load a frozen reward model, sharded if it can be and otherwise whole in every process; all call this.

    Encoders, PEFT adapters, quantized checkpoints and models with code of their own stay whole, which is said.

    Raises:
        ModelError: see `load_reward_model`.
    """
    try:
        return load_sharded_reward_model(source, template=template)
    except NotShardedError as error:
        say_once(f"{error.message}; every process holds this reward model whole")
        return load_reward_model(source, template=template)


def load_sharded_reward_model(source: ModelSource, *, template: str | None) -> RewardModel:
    """Load the reward model of `load_reward_model` whose weights are divided among the processes; all call this.

    Raises:
        ModelError: see `load_reward_model` and `open_classifier`; raised in all processes.
    """
    reward_model, unread = agreed(lambda: _opened(source, template), ProcessGroup(source.device))
    reward_model.requires_grad_(False).eval()
    unread.read()
    return reward_model


def _opened(source: ModelSource, template: str | None) -> tuple[RewardModel, UnreadModel]:
    """Return a reward model with what reads its weights."""
    folder, config = source.folder, read_reward_config(source.folder)
    base = source
    if config is not None and config.adapter:
        base = config.base_source(source)
        config.check_base(folder)
    classifier, unread = open_classifier(base)
    model = classifier.model
    check_has_head(classifier.has_head or config is not None, source.path)
    reward_model = frozen_reward_model(classifier, source, base, config, template)
    if config is not None and config.adapter:
        load_adapter(model, folder / ADAPTER_FOLDER)
        load_head(reward_model, folder)
        own = head_parameters(model, is_encoder=False)  # that of the base, if it has one, is another
        unread = replace(unread, stored={name: value for name, value in unread.stored.items() if name not in own})
    return reward_model, unread
