"""Convert GPT-2 and Llama models to explicit transformers and back: the same weights under other names.

    GPT-2    learned positions, LayerNorm before each part, GELU; linear layers stored input first, Q, K and V in one
    Llama    rotary positions, RMSNorm before each part, SwiGLU, fewer key than query heads

Logits agree up to rounding. Settings or weights without a counterpart raise an error that names them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from rlhf_cli.errors import ModelError
from rlhf_cli.transformer.classifier import TransformerForSequenceClassification
from rlhf_cli.transformer.config import TransformerConfig
from rlhf_cli.transformer.conversion_configs import TOKENS, explicit_config, gpt2_config, llama_config
from rlhf_cli.transformer.heads import TransformerForCausalLM

_OUTER = "model.decoder"


def as_explicit(model: PreTrainedModel, name: str = "the model") -> TransformerForCausalLM:
    """Convert a language model to an explicit transformer with a copy of its weights.

    Args:
        model: a `GPT2LMHeadModel` or `LlamaForCausalLM` of transformers.
        name: of the model, for messages.

    Raises:
        ModelError: another architecture, or a setting or weight that the explicit transformer does not have.
    """
    family = _family(model, name)
    config = explicit_config(model.config, name)
    state = dict(_renamed(model.state_dict(), family, config.num_hidden_layers, name, to_ours=True))
    return _filled(TransformerForCausalLM, config, state, model, name)


def as_transformers(
    model: TransformerForCausalLM | TransformerForSequenceClassification, name: str = "the model"
) -> PreTrainedModel:
    """Convert an explicit decoder, or a classifier on one, to the GPT-2 or Llama that computes the same.

    Raises:
        ModelError: the model is not an explicit decoder, or its combination of parts is neither GPT-2 nor Llama.
    """
    is_classifier = type(model) is TransformerForSequenceClassification and model.config.architecture == "decoder"
    if type(model) is not TransformerForCausalLM and not is_classifier:
        raise ModelError(
            f"cannot export `{name}`: it must be a built-in transformer (decoder), got {type(model).__name__}",
            hint="`rlhf transformer convert` converts a GPT-2 or a Llama to one",
        )
    found = _counterpart(model.config, name)
    if isinstance(found, list):
        raise ModelError(
            f"`{name}` is neither a GPT-2 nor a Llama: {'; '.join(found)}",
            hint="after `import rlhf_cli.transformer`, `AutoModelForCausalLM.from_pretrained` loads the model as it is",
        )
    family, config = found
    state = dict(_renamed(model.state_dict(), family, model.config.num_hidden_layers, name, to_ours=False))
    if is_classifier:
        config.num_labels = model.config.num_labels or 1
    return _filled(family.classifier if is_classifier else family.kind, config, state, model, name)


@dataclass(frozen=True)
class Counterpart:
    """The GPT-2 or Llama that computes the same as an explicit decoder.

    Attributes:
        kind: its class.
        config: its configuration.
    """

    kind: type[PreTrainedModel]
    config: PretrainedConfig
    _family: _Family
    _layers: int

    def weights(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield its weights, made of ours, which are asked for one after another."""
        return _renamed(ours, self._family, self._layers, "the model", to_ours=False)


def counterpart(config: TransformerConfig) -> Counterpart | None:
    """Return the GPT-2 or Llama that computes the same as the decoder of a configuration; None for none."""
    found = _counterpart(config, "the model") if config.architecture == "decoder" else []
    if isinstance(found, list):
        return None
    family, theirs = found
    return Counterpart(family.kind, theirs, family, config.num_hidden_layers)


def _counterpart(config: TransformerConfig, name: str) -> tuple[_Family, PretrainedConfig] | list[str]:
    """Return the family that computes the same, with its configuration; or why each family does not."""
    reasons = []
    for family in _FAMILIES:
        try:
            theirs = family.config_of(config)
            found, requested = (_parts(one) for one in (explicit_config(theirs, name), config))
        except (ValueError, StrictDataclassError) as error:  # the family does not support these sizes
            reasons.append(f"as a {family.name}, {' '.join(str(error).split())}")
            continue
        differing = [key for key in requested if requested[key] != found[key]]
        if not differing:
            return family, theirs
        reasons.append(f"{family.name} has no `{differing[0]}: {getattr(config, differing[0])}`")
    return reasons


@dataclass(frozen=True)
class _Family:
    """The module names of an architecture.

    Attributes:
        name: of the family.
        kind: transformers' language model.
        classifier: transformers' sequence classifier.
        config_of: converts one of our configurations to one of the family.
        layers: prefix of a layer's index.
        outside: modules outside the layers, their name -> our name.
        inside: modules of a layer, their name -> our names; several if their module joins them.
        is_input_first: linear layers inside are stored as (in, out).
    """

    name: str
    kind: type[PreTrainedModel]
    classifier: type[PreTrainedModel]
    config_of: Callable[[TransformerConfig], PretrainedConfig]
    layers: str
    outside: dict[str, str]
    inside: dict[str, tuple[str, ...]]
    is_input_first: bool = False

    def modules(self, layers: int) -> Iterator[tuple[str, tuple[str, ...], bool]]:
        """Yield for every module its name, our names, and whether its matrix is stored transposed."""
        for theirs, ours in self.outside.items():
            yield theirs, (ours,), False
        for layer in range(layers):
            for theirs, names in self.inside.items():
                ours = tuple(f"{_OUTER}.layers.{layer}.{name}" for name in names)
                yield f"{self.layers}.{layer}.{theirs}", ours, self.is_input_first


_GPT2 = _Family(
    name="GPT-2",
    kind=GPT2LMHeadModel,
    classifier=GPT2ForSequenceClassification,
    config_of=gpt2_config,
    layers="transformer.h",
    outside={
        "transformer.wte": f"{_OUTER}.embed_tokens",
        "transformer.wpe": f"{_OUTER}.positions.table",
        "transformer.ln_f": f"{_OUTER}.norm",
        "lm_head": "lm_head",
        "score": "score",
    },
    inside={
        "ln_1": ("self_attention_norm",),
        "attn.c_attn": ("self_attention.q_proj", "self_attention.k_proj", "self_attention.v_proj"),
        "attn.c_proj": ("self_attention.o_proj",),
        "ln_2": ("feed_forward_norm",),
        "mlp.c_fc": ("feed_forward.up_proj",),
        "mlp.c_proj": ("feed_forward.down_proj",),
    },
    is_input_first=True,
)
_LLAMA = _Family(
    name="Llama",
    kind=LlamaForCausalLM,
    classifier=LlamaForSequenceClassification,
    config_of=llama_config,
    layers="model.layers",
    outside={
        "model.embed_tokens": f"{_OUTER}.embed_tokens",
        "model.norm": f"{_OUTER}.norm",
        "lm_head": "lm_head",
        "score": "score",
    },
    inside={
        "input_layernorm": ("self_attention_norm",),
        **{f"self_attn.{name}": (f"self_attention.{name}",) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        "post_attention_layernorm": ("feed_forward_norm",),
        **{f"mlp.{name}": (f"feed_forward.{name}",) for name in ("gate_proj", "up_proj", "down_proj")},
    },
)
_FAMILIES = (_GPT2, _LLAMA)


def _family(model: PreTrainedModel, name: str) -> _Family:
    for family in _FAMILIES:
        if type(model) is family.kind:
            return family
    raise ModelError(
        f"cannot convert `{name}`: {type(model).__name__} is not supported",
        hint="use a language model of the GPT-2 or Llama family (SmolLM2 and TinyLlama are Llamas)",
    )


def _parts(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields that decide what the weights compute, without those for training and storage."""
    own = {key for key in TransformerConfig.__annotations__ if key not in ("initializer_range", "use_cache", *TOKENS)}
    return {key: value for key, value in config.to_dict().items() if key in own}


def _renamed(
    state: Mapping[str, Tensor], family: _Family, layers: int, name: str, *, to_ours: bool
) -> Iterator[tuple[str, Tensor]]:
    """Rename weights one after another, split, joined or transposed as the family stores them.

    Raises:
        ModelError: a weight has no counterpart; without it the model would compute something else.
    """
    used: set[str] = set()
    for theirs, ours, input_first in family.modules(layers):
        for leaf in ("weight", "bias"):
            names, source = [f"{module}.{leaf}" for module in ours], f"{theirs}.{leaf}"
            if to_ours and source in state:
                used.add(source)
                tensor = state[source]
                matrix = tensor.t() if input_first and tensor.dim() == 2 else tensor
                yield from zip(names, matrix.chunk(len(names)), strict=True)
            elif not to_ours and all(module in state for module in names):
                used.update(names)
                parts = [state[module] for module in names]
                joined = torch.cat(parts) if len(parts) > 1 else parts[0]
                yield source, joined.t() if input_first and joined.dim() == 2 else joined
    if unknown := [weight for weight in state if weight not in used]:
        raise ModelError(
            f"`{name}` has {len(unknown):,} weights that a plain {family.name} does not have, such as `{unknown[0]}`",
            hint="merge adapters first; other modifications cannot be converted",
        )


def _filled(
    kind: type[Any], config: PretrainedConfig, state: dict[str, Tensor], like: PreTrainedModel, name: str
) -> Any:
    """Make a model with a copy of these weights, with dtype, device and mode of another model."""
    model = kind(config).to(device=like.device, dtype=like.dtype)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ModelError(
            f"the weights of `{name}` do not fit its configuration: {' '.join(str(error).split())}",
            hint="give the folder of a complete, unmodified language model",
        ) from error
    if model.can_generate():
        model.generation_config = copy.deepcopy(like.generation_config)
    return model.train(like.training)
