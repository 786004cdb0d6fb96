"""GPT-2 and Llama checkpoints as explicit transformers, and back: the same weights under other names.

    GPT-2    learned positions, LayerNorm before each part, GELU; linear layers stored input first, Q, K and V in one
    Llama    rotary positions, RMSNorm before each part, SwiGLU, fewer key than query heads

Logits are the same to rounding. What a checkpoint has that the explicit transformer has not is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.transformer.config import TransformerConfig
from rlhf_cli.transformer.heads import TransformerForCausalLM

_OUTER = "model.decoder"
_ACTIVATIONS = {"gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh", "gelu": "gelu", "relu": "relu"}
_PLAIN = ("vocab_size", "max_position_embeddings", "tie_word_embeddings", "initializer_range", "use_cache")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def as_explicit(model: PreTrainedModel, name: str = "the model") -> TransformerForCausalLM:
    """The same language model as an explicit transformer: its own weights, copied.

    Args:
        model: of transformers' `GPT2LMHeadModel` or `LlamaForCausalLM`.
        name: of it, for messages.

    Raises:
        ModelError: another architecture, or a setting that the explicit transformer has not.
    """
    family = _family(model, name)
    config = explicit_config(model.config, name)
    state = dict(_renamed(model.state_dict(), family, config.num_hidden_layers, to_ours=True))
    return _filled(TransformerForCausalLM, config, state, model)


def as_transformers(model: TransformerForCausalLM, name: str = "the model") -> PreTrainedModel:
    """The inverse of `as_explicit`, for programs that do not know the explicit transformer.

    Raises:
        ModelError: it has parts that neither GPT-2 nor Llama has together.
    """
    differing: dict[str, list[str]] = {}
    for family in _FAMILIES:
        theirs = family.config_of(model.config)
        found, wanted = (_parts(config) for config in (explicit_config(theirs, name), model.config))
        differing[family.name] = [key for key in wanted if wanted[key] != found[key]]
        if not differing[family.name]:
            state = dict(_renamed(model.state_dict(), family, model.config.num_hidden_layers, to_ours=False))
            return _filled(family.kind, theirs, state, model)
    reasons = "; ".join(
        f"{family} has no `{keys[0]}: {getattr(model.config, keys[0])}`" for family, keys in differing.items()
    )
    raise ModelError(f"`{name}` is neither a GPT-2 nor a Llama: {reasons}")


def explicit_config(config: PretrainedConfig, name: str = "the model") -> TransformerConfig:
    """The explicit transformer's configuration of a GPT-2 or a Llama.

    Raises:
        ModelError: another architecture, or a setting that the explicit transformer has not.
    """
    if isinstance(config, GPT2Config):
        parts = _parts_of_gpt2(config, name)
    elif type(config) is LlamaConfig:
        parts = _parts_of_llama(config, name)
    else:
        raise ModelError(
            f"`{name}` is a {config.model_type} model, which the explicit transformer cannot be",
            hint="it takes the GPT-2 and Llama families (SmolLM2 and TinyLlama are Llamas)",
        )
    shared = {key: getattr(config, key) for key in (*_PLAIN, *_TOKENS)}
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    return TransformerConfig(**parts, **shared, **{key: getattr(config, key) for key in sizes})


def _parts_of_gpt2(config: GPT2Config, name: str) -> dict[str, Any]:
    for setting, known in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("reorder_and_upcast_attn", False),
        ("add_cross_attention", False),
    ):
        if getattr(config, setting) != known:
            raise _unknown(name, setting, getattr(config, setting))
    if config.activation_function not in _ACTIVATIONS:
        raise _unknown(name, "activation_function", config.activation_function)
    return {
        "positions": "learned",
        "norm": "layer",
        "norm_placement": "pre",
        "feed_forward": _ACTIVATIONS[config.activation_function],
        "intermediate_size": config.n_inner or 4 * config.n_embd,
        "attention_biases": True,
        "feed_forward_biases": True,
        "norm_eps": config.layer_norm_epsilon,
    }


def _parts_of_llama(config: LlamaConfig, name: str) -> dict[str, Any]:
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    kind = rope.pop("rope_type", "default")
    base = rope.pop("rope_theta", 10_000.0)
    if kind not in ("default", "llama3"):
        raise _unknown(name, "rope_type", kind)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unknown(name, "partial_rotary_factor", rope["partial_rotary_factor"])
    if config.hidden_act != "silu":
        raise _unknown(name, "hidden_act", config.hidden_act)
    if getattr(config, "sliding_window", None) is not None:
        raise _unknown(name, "sliding_window", getattr(config, "sliding_window", None))
    stretching = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "attention_biases": config.attention_bias,
        "feed_forward_biases": config.mlp_bias,
        "norm_eps": config.rms_norm_eps,
        "rope_base": base,
        "llama3_rope": {key: rope[key] for key in stretching} if kind == "llama3" else None,
    }


def _unknown(name: str, setting: str, value: object) -> ModelError:
    return ModelError(
        f"`{name}` has `{setting}: {value}`, which the explicit transformer does not know",
        hint="use the model as it is; only models that compute the same can be converted",
    )


def _gpt2_config(config: TransformerConfig) -> GPT2Config:
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items() if theirs != "gelu_pytorch_tanh"}
    return GPT2Config(
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_inner=config.intermediate_size,
        activation_function=names.get(config.feed_forward, "gelu"),
        layer_norm_epsilon=config.norm_eps,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **{key: getattr(config, key) for key in (*_PLAIN, *_TOKENS)},
    )


def _llama_config(config: TransformerConfig) -> LlamaConfig:
    stretching = (
        {"rope_type": "default"} if config.llama3_rope is None else {"rope_type": "llama3", **config.llama3_rope}
    )
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return LlamaConfig(
        head_dim=config.head_dim,
        attention_bias=config.attention_biases,
        mlp_bias=config.feed_forward_biases,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_theta": config.rope_base, **stretching},
        **{key: getattr(config, key) for key in (*_PLAIN, *_TOKENS, *sizes)},
    )


@dataclass(frozen=True)
class _Family:
    """How an architecture names its modules.

    Attributes:
        name: of the family.
        kind: transformers' class.
        config_of: its configuration, of one of ours.
        layers: what stands before a layer's number.
        outside: modules outside the layers, theirs to ours.
        inside: modules of a layer, theirs to ours; several of ours where theirs are one.
        is_input_first: linear layers inside are stored (in, out).
    """

    name: str
    kind: type[PreTrainedModel]
    config_of: Callable[[TransformerConfig], PretrainedConfig]
    layers: str
    outside: dict[str, str]
    inside: dict[str, tuple[str, ...]]
    is_input_first: bool = False

    def modules(self, layers: int) -> Iterator[tuple[str, tuple[str, ...], bool]]:
        """Every module: theirs, ours, and whether its matrix is stored the other way round."""
        for theirs, ours in self.outside.items():
            yield theirs, (ours,), False
        for layer in range(layers):
            for theirs, names in self.inside.items():
                ours = tuple(f"{_OUTER}.layers.{layer}.{name}" for name in names)
                yield f"{self.layers}.{layer}.{theirs}", ours, self.is_input_first


_GPT2 = _Family(
    name="GPT-2",
    kind=GPT2LMHeadModel,
    config_of=_gpt2_config,
    layers="transformer.h",
    outside={
        "transformer.wte": f"{_OUTER}.embed_tokens",
        "transformer.wpe": f"{_OUTER}.positions.table",
        "transformer.ln_f": f"{_OUTER}.norm",
        "lm_head": "lm_head",
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
    config_of=_llama_config,
    layers="model.layers",
    outside={
        "model.embed_tokens": f"{_OUTER}.embed_tokens",
        "model.norm": f"{_OUTER}.norm",
        "lm_head": "lm_head",
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
        f"`{name}` is a {type(model).__name__}, which the explicit transformer cannot be",
        hint="it takes language models of the GPT-2 and Llama families (SmolLM2 and TinyLlama are Llamas)",
    )


def _parts(config: TransformerConfig) -> dict[str, Any]:
    """What the weights mean, without what only says how to train or store them."""
    own = {key for key in TransformerConfig.__annotations__ if key not in ("initializer_range", "use_cache", *_TOKENS)}
    return {key: value for key, value in config.to_dict().items() if key in own}


def _renamed(state: dict[str, Tensor], family: _Family, layers: int, *, to_ours: bool) -> Iterator[tuple[str, Tensor]]:
    """Weights under the other names, split or joined, and transposed where the family stores them so."""
    for theirs, ours, input_first in family.modules(layers):
        for leaf in ("weight", "bias"):
            names, source = [f"{name}.{leaf}" for name in ours], f"{theirs}.{leaf}"
            if to_ours and source in state:
                tensor = state[source]
                turned = tensor.t() if input_first and tensor.dim() == 2 else tensor
                yield from zip(names, turned.chunk(len(names)), strict=True)
            elif not to_ours and names[0] in state:
                joined = torch.cat([state[name] for name in names])
                yield source, joined.t() if input_first and joined.dim() == 2 else joined


def _filled(kind: type[Any], config: PretrainedConfig, state: dict[str, Tensor], like: PreTrainedModel) -> Any:
    """A model of these weights, copied, in the precision and on the device of another."""
    model = kind(config).to(device=like.device, dtype=like.dtype)
    model.load_state_dict(state, strict=True)
    model.generation_config = like.generation_config
    return model.train(like.training)
