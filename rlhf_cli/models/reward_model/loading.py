"""Reward models made from a language model, an encoder or a reward model, and trained ones loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.memory import is_out_of_memory
from rlhf_cli.models.adapter_files import load_adapter
from rlhf_cli.models.loading import ModelSource, load_tokenizer, recompute_activations
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.reward_model.classifier import (
    Classifier,
    check_has_head,
    head_of,
    head_parameters,
    load_classifier,
)
from rlhf_cli.models.reward_model.files import (
    ADAPTER_FOLDER,
    RewardModelConfig,
    load_head,
    read_reward_config,
    refuse_adapter_as_start,
)
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.models.seeding import seeded
from rlhf_cli.progress import say, say_once
from rlhf_cli.settings.shared import LoraSettings


def new_reward_model(
    source: ModelSource,
    *,
    template: str | None,
    template_kwargs: Mapping[str, Any] | None = None,
    lora: LoraSettings | None,
    seed: int = 0,
    gradient_checkpointing: bool = False,
) -> RewardModel:
    """Make a reward model to train from a language model, an encoder or a reward model, whose head is kept.

    A new head is drawn from N(0, 1/(d + 1)) with bias 0 (Ziegler et al. 2019).

    Args:
        source: the model to start from.
        template: template of plain-text prompts, see `PromptFormat`.
        template_kwargs: arguments of the chat template.
        lora: the adapter to train; None trains all weights in float32.
        seed: of new weights.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        ModelError: see `load_classifier` and `add_lora`; also if the source is a reward model saved as an adapter.
    """
    refuse_adapter_as_start(source.path, read_reward_config(source.folder))
    with seeded(seed, source.device):
        classifier = load_classifier(source, dtype=None if lora else torch.float32)
        head = head_of(classifier.model, source.path)
        if not classifier.has_head:
            nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
            if head.bias is not None:
                nn.init.zeros_(head.bias)
        if lora is not None:
            add_reward_adapter(classifier, lora)
    if gradient_checkpointing:
        recompute_activations(classifier.model)
    return reward_model_on(classifier, source, template, template_kwargs or {})


def add_reward_adapter(classifier: Classifier, lora: LoraSettings) -> None:
    """Add the adapter to train, and let the head be trained in float32."""
    add_lora(classifier.model, lora)
    for parameter in head_parameters(classifier.model, is_encoder=classifier.is_encoder).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def load_reward_model(source: ModelSource, *, template: str | None) -> RewardModel:
    """Load a trained reward model, frozen and in evaluation mode.

    Args:
        source: folder that `save_reward_model` wrote, or any transformers classifier with one label.
        template: template of plain-text prompts, for a model that neither records one nor has a chat template.

    Raises:
        ModelError: several labels, no head, or damaged files.
    """
    folder = source.folder
    config = read_reward_config(folder)
    if config is not None and config.adapter:
        base = config.base_source(source)
        config.check_base(folder)
    else:
        base = replace(source, quantize="none")  # only frozen weights under an adapter are quantized
    classifier = load_classifier(base)
    check_has_head(classifier.has_head or config is not None, source.path)
    reward_model = frozen_reward_model(classifier, source, base, config, template)
    if config is not None and config.adapter:
        load_adapter(classifier.model, folder / ADAPTER_FOLDER)
        load_head(reward_model, folder)
    return reward_model.requires_grad_(False).eval()


def frozen_reward_model(
    classifier: Classifier,
    source: ModelSource,
    base: ModelSource,
    config: RewardModelConfig | None,
    template: str | None,
) -> RewardModel:
    """Return a saved reward model on its classifier, as yet without its adapter.

    Args:
        classifier: of the base.
        source: of the reward model.
        base: of the classifier.
        config: of the reward model; None for a classifier of other origin.
        template: see `load_reward_model`.
    """
    if config is not None:
        reward_model = reward_model_on(classifier, base, config.template, config.template_kwargs, reader=source)
        reward_model.mean, reward_model.std = config.mean, config.std
        return reward_model
    own = "chat" if getattr(load_tokenizer(base), "chat_template", None) else template
    if template is not None and own != template:
        say(f"the reward model {source.path} reads prompts in its own chat template, not as {template!r}")
    return reward_model_on(classifier, base, own, {})


def reward_format(
    source: ModelSource,
    template: str | None,
    *,
    is_encoder: bool,
    template_kwargs: Mapping[str, Any] | None = None,
) -> PromptFormat:
    """Return how the reward model at `source` reads prompts and completions."""
    tokenizer = load_tokenizer(source)
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        template = None  # `chat` describes the policy's prompts; this model has no chat template
    return PromptFormat(
        tokenizer,
        template,
        name=f"`{source.path}`",
        is_encoder=is_encoder,
        template_kwargs=template_kwargs or {},
    )


def reward_model_on(
    classifier: Classifier,
    source: ModelSource,
    template: str | None,
    template_kwargs: Mapping[str, Any],
    *,
    reader: ModelSource | None = None,
) -> RewardModel:
    """Return a reward model on the base at `source`; its tokenizer is that at `reader`, or the base's."""
    is_encoder = classifier.is_encoder
    format = reward_format(reader or source, template, is_encoder=is_encoder, template_kwargs=template_kwargs)
    reward_model = RewardModel(classifier.model, format, source, is_encoder=is_encoder)
    if classifier.bias is not None:
        reward_model.bias.copy_(classifier.bias)
    if is_encoder and source.precision != torch.float32:
        _require_precision(reward_model)
    return reward_model


@torch.no_grad()
def _require_precision(reward_model: RewardModel) -> None:
    """Let an encoder compute in float32 if its forward pass fails under autocast.

    That of the first DeBERTa does: it fills masked scores with a number that bfloat16 does not have. Decoders pass the
    parity check of attention at loading.
    """
    texts = [reward_model.encode("Why?", completion) for completion in ("So.", "It is so.")]
    try:
        reward_model(reward_model.batch(texts))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        precision = str(reward_model.source.precision).removeprefix("torch.")
        reward_model.source = replace(reward_model.source, precision=torch.float32)
        reward_model(reward_model.batch(texts))  # raises where the precision is not the reason
        say_once(f"{reward_model.source.path} computes in float32: under {precision} its forward pass fails ({error})")
