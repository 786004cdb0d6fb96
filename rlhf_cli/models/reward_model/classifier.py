"""The transformers classifier inside a reward model: its backbone, its reward head and its maximum length.

Decoders and encoders are both loaded as a transformers sequence classifier with one label. So a reward model trained in
full is an ordinary model folder, and any such classifier on the hub can be a reward model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
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
        model: the transformers model.
        is_encoder: attention is bidirectional and the head reads a pooled state.
        has_head: the head was loaded; otherwise it is new.
    """

    model: PreTrainedModel
    is_encoder: bool
    has_head: bool


def load_classifier(source: ModelSource, *, dtype: torch.dtype | None = None) -> Classifier:
    """Load a sequence classifier with one label from a folder or hub id.

    Missing weights (the head of a language model, the pooler of a masked language model) are drawn from torch's global
    generator: seed it first. Encoders are always float32: they are small, and their heads are trained.

    Raises:
        ModelError: an encoder-decoder, a classifier with several labels, or an unsupported architecture.
    """
    config = load_config(source)
    is_encoder = check_reward_config(config, source.path)
    has_head = is_classifier(config)
    config.num_labels = 1
    kind = classifier_class(config, source.path)
    model = load_weights(kind, source, config, dtype=torch.float32 if is_encoder else dtype)
    return Classifier(model, is_encoder, has_head)


def check_reward_config(config: PretrainedConfig, path: str) -> bool:
    """Return whether a model of this configuration is an encoder.

    Raises:
        ModelError: it cannot be a reward model.
    """
    if config.is_encoder_decoder:
        raise ModelError(
            f"`{path}` is a {config.model_type} model; an encoder-decoder cannot be a reward model",
            hint="use a decoder-only model (Llama, Qwen, GPT-2, ...) or an encoder (BERT, RoBERTa, DeBERTa, ...)",
        )
    if is_classifier(config) and config.num_labels != 1:
        labels = ", ".join(str(label) for label in (config.id2label or {}).values())
        raise ModelError(
            f"`{path}`: a reward model must have one label, got {config.num_labels} ({labels})",
            hint="use a model trained with `num_labels=1`, or run `rlhf train-rm` from its language model",
        )
    reads_both_ways = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    if not reads_both_ways and type(config) not in AutoModelForCausalLM._model_mapping:
        # Encoders that transformers registers for classification only, without a masked language model.
        return type(config) in AutoModelForSequenceClassification._model_mapping
    return reads_both_ways


def is_classifier(config: PretrainedConfig) -> bool:
    """Return whether the weights of this configuration include a classification head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def classifier_class(config: PretrainedConfig, path: str) -> type:
    """Return the classifier class of an architecture: that of transformers, or one derived from its language model.

    Raises:
        ModelError: the architecture has neither.
    """
    if type(config) in AutoModelForSequenceClassification._model_mapping:
        return AutoModelForSequenceClassification
    languages = (AutoModelForCausalLM._model_mapping, AutoModelForImageTextToText._model_mapping)
    mapping = next((mapping for mapping in languages if type(config) in mapping), None)
    if mapping is None:
        raise ModelError(
            f"`{path}` is a {config.model_type} model, which cannot be a reward model",
            hint="use a decoder-only language model or an encoder of the BERT family",
        )
    # Transformers' generic classifier, for architectures without a class of their own (Granite, Cohere).
    causal: type[PreTrainedModel] = mapping[type(config)]  # pyright: ignore[reportAssignmentType]
    parent = next(base for base in causal.__mro__[1:] if issubclass(base, PreTrainedModel))
    name = re.sub("For[A-Z].*", "ForSequenceClassification", causal.__name__)
    # With another `__module__`, transformers takes it for code of the model's own and does not initialize all buffers.
    attributes = {"base_model_prefix": causal.base_model_prefix, "__module__": causal.__module__}
    return type(name, (GenericForSequenceClassification, parent), attributes)


def head_of(classifier: PreTrainedModel, path: str) -> nn.Linear:
    """Find the reward head: the last linear layer outside the backbone with one output, weight (1, d).

    Raises:
        ModelError: there is none.
    """
    inside = {id(module) for module in classifier.base_model.modules()}
    heads = [
        module
        for module in classifier.modules()
        if isinstance(module, nn.Linear) and module.out_features == 1 and id(module) not in inside
    ]
    if not heads:
        raise ModelError(f"`{path}`: {type(classifier).__name__} has no linear layer with one output as reward head")
    return heads[-1]


def head_parameters(classifier: PreTrainedModel, *, is_encoder: bool) -> dict[str, nn.Parameter]:
    """Return the parameters trained in full beside an adapter: the head and, in an encoder, the pooler."""
    prefix = classifier.base_model_prefix + "."
    return {
        name: parameter
        for name, parameter in classifier.named_parameters()
        if not name.startswith(prefix) or (is_encoder and ".pooler." in name)
    }


def max_length_of(classifier: PreTrainedModel) -> int:
    """Return the longest sequence in tokens that the classifier reads."""
    max_length = context_length(classifier.config)
    for name, module in classifier.named_modules():
        # RoBERTa counts positions from padding_idx + 1, so it reads fewer tokens than its configuration says.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            max_length = min(max_length, module.num_embeddings - module.padding_idx - 1)
    return max_length
