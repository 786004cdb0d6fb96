"""The transformers model around which a scorer is built: its backbone, its reward head, how much text it takes.

Decoders and encoders both come as a transformers sequence classifier with one label, so that a scorer trained in full
is an ordinary model folder and anyone's reward model on the hub is a scorer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from rlhf_cli.errors import ModelError
from rlhf_cli.models.loading import ModelSource, context_length, load_config, load_weights


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier with one label.

    Attributes:
        model: the classifier.
        is_encoder: it reads both ways and has a pooled head.
        has_head: its weights came with a head; otherwise the head is new.
    """

    model: PreTrainedModel
    is_encoder: bool
    has_head: bool


def load_classifier(source: ModelSource, *, dtype: torch.dtype | None = None) -> Classifier:
    """The classifier that a folder or hub id gives.

    Whatever the folder lacks (the head of a language model, the pooler of a masked language model) is drawn from
    torch's global generator: seed it first. Encoders are always held in float32: they are small, their heads trained.

    Raises:
        ModelError: an encoder-decoder, a classifier with several labels, or an architecture that cannot score.
    """
    config = load_config(source)
    is_encoder = check_reward_config(config, source.path)
    has_head = is_classifier(config)
    config.num_labels = 1
    kind = classifier_class(config, source.path)
    model = load_weights(kind, source, config, dtype=torch.float32 if is_encoder else dtype)
    return Classifier(model, is_encoder, has_head)


def check_reward_config(config: PretrainedConfig, path: str) -> bool:
    """Whether a model of this configuration is an encoder; raises `ModelError` where it cannot be a scorer."""
    if config.is_encoder_decoder:
        raise ModelError(
            f"`{path}` is a {config.model_type} model, an encoder-decoder, which cannot be a reward model here",
            hint="give a decoder-only model (Llama, Qwen, GPT-2, ...) or an encoder (BERT, RoBERTa, DeBERTa, ...)",
        )
    if is_classifier(config) and config.num_labels != 1:
        labels = ", ".join(str(label) for label in (config.id2label or {}).values())
        raise ModelError(
            f"`{path}` classifies into {config.num_labels} labels ({labels}); a reward model has one",
            hint="give one that was trained with `num_labels=1`, or run `rlhf train-rm` from its language model",
        )
    reads_both_ways = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    if not reads_both_ways and type(config) not in AutoModelForCausalLM._model_mapping:
        # Encoders without a masked language model head of their own, such as those that only classify.
        return type(config) in AutoModelForSequenceClassification._model_mapping
    return reads_both_ways


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether the weights that belong to a configuration hold a head already."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def classifier_class(config: PretrainedConfig, path: str) -> type:
    """The class that scores for an architecture: transformers' own where there is one, else one made by its recipe."""
    if type(config) in AutoModelForSequenceClassification._model_mapping:
        return AutoModelForSequenceClassification
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"`{path}` is a {config.model_type} model, which cannot be a reward model",
            hint="give a decoder-only language model or an encoder of the BERT family",
        )
    # Transformers' own recipe for a classifier, for architectures that it has not applied it to (Granite, Cohere).
    causal: type[PreTrainedModel] = AutoModelForCausalLM._model_mapping[type(config)]  # pyright: ignore[reportAssignmentType]
    parent = next(base for base in causal.__mro__[1:] if issubclass(base, PreTrainedModel))
    name = causal.__name__.replace("ForCausalLM", "ForSequenceClassification")
    return type(name, (GenericForSequenceClassification, parent), {"base_model_prefix": causal.base_model_prefix})


def head_of(shell: PreTrainedModel, path: str) -> nn.Linear:
    """The last linear layer with one output, outside the backbone: (1, d)."""
    inside = {id(module) for module in shell.base_model.modules()}
    heads = [
        module
        for module in shell.modules()
        if isinstance(module, nn.Linear) and module.out_features == 1 and id(module) not in inside
    ]
    if not heads:
        raise ModelError(f"`{path}`: no linear reward head was found in its {type(shell).__name__}")
    return heads[-1]


def head_parameters(shell: PreTrainedModel, *, is_encoder: bool) -> dict[str, nn.Parameter]:
    """What an adapter does not reach and is trained in full: the head and, in an encoder, its pooler."""
    prefix = shell.base_model_prefix + "."
    return {
        name: parameter
        for name, parameter in shell.named_parameters()
        if not name.startswith(prefix) or (is_encoder and ".pooler." in name)
    }


def max_length_of(shell: PreTrainedModel) -> int:
    """Longest sequence in tokens that the model reads."""
    room = context_length(shell.config)
    for name, module in shell.named_modules():
        # RoBERTa counts positions from padding_idx + 1, so it has fewer than its configuration says.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            room = min(room, module.num_embeddings - module.padding_idx - 1)
    return room
