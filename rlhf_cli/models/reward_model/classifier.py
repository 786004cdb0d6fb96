"""The transformers classifier inside a reward model: its backbone, its reward head and its maximum length.

Decoders and encoders are both loaded as a transformers sequence classifier with one label. So a reward model trained in
full is an ordinary model folder, and any such classifier on the hub can be a reward model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
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
from rlhf_cli.models.checkpoint import Checkpoint
from rlhf_cli.models.loading import ModelSource, context_length, load_config, says_labels
from rlhf_cli.models.peft_folder import find_peft_folder
from rlhf_cli.models.sharded_loading import NotShardedError, UnreadModel, open_model
from rlhf_cli.models.stored_weights import StoredHead, stored_heads
from rlhf_cli.models.weight_loading import (
    check_layers,
    check_weights,
    empty_model,
    has_own_code,
    load_weights,
    open_weights,
)
from rlhf_cli.progress import say_once


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier with one label.

    Attributes:
        model: the transformers model.
        is_encoder: attention is bidirectional and the head reads a pooled state.
        has_head: the head was loaded; otherwise it is new.
        bias: (1,) of the stored head where the model's own head has none; else None.
    """

    model: PreTrainedModel
    is_encoder: bool
    has_head: bool
    bias: Tensor | None = None


def load_classifier(source: ModelSource, *, dtype: torch.dtype | None = None) -> Classifier:
    """Load a sequence classifier with one label from a folder or hub id.

    What a language model lacks (the head, and the pooler of a masked language model) is drawn from torch's global
    generator: seed it first. Encoders are always float32: they are small, and their heads are trained.

    Raises:
        ModelError: an encoder-decoder, a classifier with several labels, an unsupported architecture, or weights that
            are not those of the model.
    """
    plan = _plan(source)
    model = load_weights(
        plan.kind,
        source,
        plan.config,
        dtype=torch.float32 if plan.is_encoder else dtype,
        checkpoint=plan.checkpoint,
        is_new=plan.is_new,
    )
    return Classifier(model, plan.is_encoder, plan.has_head, plan.bias)


def open_classifier(source: ModelSource, *, dtype: torch.dtype | None = None) -> tuple[Classifier, UnreadModel]:
    """Open what `load_classifier` loads, to be sharded: weights are not read yet, but a new head has its first values.

    Those are the ones that `models.reward_model.loading.new_reward_model` draws.

    Raises:
        ModelError: see `load_classifier` and `open_model`; also for an encoder.
    """
    plan = _plan(source)
    if plan.is_encoder:
        raise NotShardedError(
            f"`model.sharding: fsdp`: `{source.path}` is an encoder, which is small enough for every process",
            hint="use `--set model.sharding=none`",
        )
    unread = open_model(plan.kind, source, plan.config, dtype=dtype, checkpoint=plan.checkpoint, is_new=plan.is_new)
    head = head_of(unread.model, source.path)
    if not plan.has_head:
        head.weight.data = torch.empty(head.weight.shape, dtype=head.weight.dtype)
        for _ in range(2):  # the first values are those that transformers draws for a weight that is missing
            nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
        if head.bias is not None:
            head.bias.data = torch.zeros(head.bias.shape, dtype=head.bias.dtype)
    return Classifier(unread.model, plan.is_encoder, plan.has_head, plan.bias), unread


def read_head(source: ModelSource) -> tuple[Tensor, Tensor]:
    """Read the reward head of a classifier and nothing else of it: weight (1, d) and bias (1,), in float32.

    Raises:
        ModelError: see `load_classifier`; also if there is no stored head.
    """
    plan = _plan(source)
    weight, bias = f"{plan.own.name}.weight", f"{plan.own.name}.bias"
    check_has_head(weight in plan.checkpoint.shapes, source.path)
    stored_bias = plan.checkpoint.read(bias) if plan.own.has_bias else plan.bias
    return plan.checkpoint.read(weight), torch.zeros(1) if stored_bias is None else stored_bias


def check_has_head(has_head: bool, path: str) -> None:
    """Raise `ModelError` for a model without a reward head."""
    if not has_head:
        raise ModelError(
            f"`{path}` has no reward head", hint="give a reward model, such as the output of `rlhf train-rm`"
        )


def check_classifier(source: ModelSource) -> bool:
    """Check that a reward model, or the model to train one from, can be loaded; no weight is read.

    Returns:
        Whether it has a reward head.

    Raises:
        ModelError: see `load_classifier`.
    """
    plan = _plan(source)
    check_weights(plan.kind, source, plan.config, shapes=plan.checkpoint.shapes, is_new=plan.is_new)
    return plan.has_head


@dataclass(frozen=True)
class _Plan:
    """How a classifier is loaded; see `Classifier` and `load_weights`.

    Attributes:
        own: the head of its class.
        is_stored: whether its checkpoint has the head.
    """

    kind: type
    config: PretrainedConfig
    own: _OwnHead
    checkpoint: Checkpoint
    is_encoder: bool
    has_head: bool
    is_stored: bool
    bias: Tensor | None

    def is_new(self, model: PreTrainedModel) -> frozenset[str]:
        """Return the names of the weights that are drawn at random: those of a new head."""
        if self.is_stored:
            return frozenset()
        return frozenset(head_parameters(model, is_encoder=self.is_encoder))


def _plan(source: ModelSource) -> _Plan:
    config = load_config(source)
    is_encoder = check_reward_config(config, source.path)
    checkpoint, adapter = open_weights(source, config), find_peft_folder(source.path, source.revision)
    said = config.num_labels if is_classifier(config) and says_labels(source) else None
    labels = list((config.id2label or {}).values())
    config.num_labels = 1
    kind = classifier_class(config, source.path)
    check_layers(config, source.path, len(checkpoint.shapes))
    own = _own_head(empty_model(kind, source, config), source.path)
    trained = None if adapter is None else _stored_head(adapter.shapes, own, source.path)
    head = _stored_head(checkpoint.shapes, own, source.path)
    found = trained or head
    _check_labels(source.path, said, None if found is None else found.rows, labels)
    bias = None
    if head is not None:
        checkpoint, bias = _use_head(checkpoint, head, own, source.path)
    # The head that an adapter was trained with takes the place of the base's.
    has_base_head = head is not None or is_classifier(config)
    return _Plan(kind, config, own, checkpoint, is_encoder, found is not None or has_base_head, has_base_head, bias)


@dataclass(frozen=True)
class _OwnHead:
    """The reward head of a classifier: name of its module, width d and whether it has a bias."""

    name: str
    width: int
    has_bias: bool


def _own_head(empty: PreTrainedModel, path: str) -> _OwnHead:
    head = head_of(empty, path)
    name = next(key for key, module in empty.named_modules() if module is head)
    return _OwnHead(name, head.in_features, head.bias is not None)


def _stored_head(shapes: Mapping[str, tuple[int, ...]], own: _OwnHead, path: str) -> StoredHead | None:
    """Return the stored reward head: the one under the classifier's own name, else one under another known name.

    Raises:
        ModelError: several layers could be the head.
    """
    heads = stored_heads(shapes)
    if (same := next((head for head in heads if head.name == own.name), None)) is not None:
        return same
    heads = [head for head in heads if head.width == own.width and head.name.split(".")[0] != own.name.split(".")[0]]
    if len(heads) > 1:
        raise ModelError(
            f"`{path}`: several stored layers could be the reward head: {', '.join(head.name for head in heads)}",
            hint=f"store the right one as `{own.name}`, and remove the others",
        )
    return next(iter(heads), None)


def _use_head(checkpoint: Checkpoint, head: StoredHead, own: _OwnHead, path: str) -> tuple[Checkpoint, Tensor | None]:
    """Give the stored head the classifier's own name, and take out a bias for which that has no place."""
    if head.name != own.name:
        say_once(f"{path}: its reward head is stored as `{head.name}`")
        checkpoint = checkpoint.renamed({f"{head.name}.{leaf}": f"{own.name}.{leaf}" for leaf in ("weight", "bias")})
    bias = f"{own.name}.bias"
    if own.has_bias or not head.has_bias:
        return checkpoint, None
    return checkpoint.without(bias), checkpoint.read(bias)


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
    reads_both_ways = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    if not reads_both_ways and type(config) not in AutoModelForCausalLM._model_mapping:
        # Encoders that transformers registers for classification only, without a masked language model.
        return type(config) in AutoModelForSequenceClassification._model_mapping
    return reads_both_ways


def _check_labels(path: str, said: int | None, rows: int | None, labels: list[str]) -> None:
    """Check that a reward model has one label, by its configuration and by the rows of its stored head.

    Args:
        path: for messages.
        said: number of labels in its configuration; None if that says nothing, which transformers reads as two.
        rows: of its stored head; None if there is none.
        labels: their names in the configuration.
    """
    if rows is not None and said is not None and rows != said:
        raise ModelError(
            f"`{path}`: its config.json says {_labels(said)}, but its stored reward head has {_labels(rows)}",
            hint="give the config.json that belongs to the weights; for a reward model, `num_labels` is 1 in it, "
            "without `id2label` and `label2id`",
        )
    if (count := rows or said or 1) != 1:
        named = f" ({', '.join(map(str, labels))})" if said is not None else ""
        raise ModelError(
            f"`{path}`: a reward model must have one label, got {count}{named}",
            hint="use a model trained with `num_labels=1`, or run `rlhf train-rm` from its language model",
        )


def _labels(count: int) -> str:
    return f"{count:,} label{'' if count == 1 else 's'}"


def is_classifier(config: PretrainedConfig) -> bool:
    """Return whether the weights of this configuration include a classification head."""
    named = config.architectures if isinstance(config.architectures, list) else ()
    return any(str(name).endswith("ForSequenceClassification") for name in named)


def classifier_class(config: PretrainedConfig, path: str) -> type:
    """Return the classifier class of an architecture: that of transformers, or one derived from its language model.

    Raises:
        ModelError: the architecture has neither.
    """
    if type(config) in AutoModelForSequenceClassification._model_mapping:
        return AutoModelForSequenceClassification
    languages = (AutoModelForCausalLM._model_mapping, AutoModelForImageTextToText._model_mapping)
    mapping = next((mapping for mapping in languages if type(config) in mapping), None)
    if mapping is None or has_own_code(config):
        raise ModelError(
            f"`{path}` is of type {config.model_type}, which cannot be a reward model",
            hint="use a decoder-only language model or an encoder of the BERT family",
        )
    # Transformers' generic classifier, for architectures without a class of their own (Granite, Cohere).
    causal: type[PreTrainedModel] = mapping[type(config)]  # pyright: ignore[reportAssignmentType]
    parent = next(base for base in causal.__mro__[1:] if issubclass(base, PreTrainedModel))
    name = re.sub("For[A-Z].*", "ForSequenceClassification", causal.__name__)
    # With another `__module__`, transformers takes it for code of the model's own and does not initialize all buffers.
    attributes = {"base_model_prefix": _backbone_name(causal), "__module__": causal.__module__}
    return type(name, (GenericForSequenceClassification, parent), attributes)


def _backbone_name(causal: type[PreTrainedModel]) -> str:
    """Return the attribute of a language model that holds its backbone, under which its weights are stored.

    It is `base_model_prefix`, but for Llama 4, whose weights are under `model`.
    """
    tied = getattr(causal, "_tied_weights_keys", None)
    embeddings = next(iter(tied.values()), "") if isinstance(tied, dict) else ""
    first, _, rest = embeddings.partition(".")
    return first if "." in rest else causal.base_model_prefix


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
