"""Convert configurations of GPT-2 and Llama to those of explicit transformers and back."""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from rlhf_cli.errors import ModelError
from rlhf_cli.transformer.config import TransformerConfig

_ACTIVATIONS = {"gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh", "gelu": "gelu", "relu": "relu"}
_PLAIN = ("vocab_size", "max_position_embeddings", "tie_word_embeddings", "initializer_range", "use_cache")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def explicit_config(config: PretrainedConfig, name: str = "the model") -> TransformerConfig:
    """Return the explicit transformer's configuration of a GPT-2 or a Llama.

    Raises:
        ModelError: another architecture, or a setting that the explicit transformer does not support.
    """
    if isinstance(config, GPT2Config):
        parts = _parts_of_gpt2(config, name)
    elif type(config) is LlamaConfig:
        parts = _parts_of_llama(config, name)
    else:
        raise ModelError(
            f"cannot convert `{name}`: a {config.model_type} model is not supported",
            hint="use a model of the GPT-2 or Llama family (SmolLM2 and TinyLlama are Llamas)",
        )
    shared = {key: getattr(config, key) for key in (*_PLAIN, *TOKENS)}
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
            raise _unsupported(name, setting, getattr(config, setting))
    _require_causal(config, name)
    if config.activation_function not in _ACTIVATIONS:
        raise _unsupported(name, "activation_function", config.activation_function)
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
    _require_causal(config, name)
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    kind = rope.pop("rope_type", "default")
    base = rope.pop("rope_theta", 10_000.0)
    if kind not in ("default", "llama3"):
        raise _unsupported(name, "rope_type", kind)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unsupported(name, "partial_rotary_factor", rope["partial_rotary_factor"])
    if config.hidden_act != "silu":
        raise _unsupported(name, "hidden_act", config.hidden_act)
    if getattr(config, "sliding_window", None) is not None:
        raise _unsupported(name, "sliding_window", getattr(config, "sliding_window", None))
    scaling = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "attention_biases": config.attention_bias,
        "feed_forward_biases": config.mlp_bias,
        "norm_eps": config.rms_norm_eps,
        "rope_base": base,
        "llama3_rope": {key: rope[key] for key in scaling} if kind == "llama3" else None,
    }


def _require_causal(config: PretrainedConfig, name: str) -> None:
    """Refuse `is_causal: false`, with which transformers builds bidirectional masks."""
    if (is_causal := getattr(config, "is_causal", True)) is not True:
        raise _unsupported(name, "is_causal", is_causal)


def _unsupported(name: str, setting: str, value: object) -> ModelError:
    return ModelError(
        f"`{name}` has `{setting}: {value}`, which the built-in transformer does not support",
        hint="use the model as it is",
    )


def gpt2_config(config: TransformerConfig) -> GPT2Config:
    """Return the GPT-2 of these sizes. It drops parts that GPT-2 lacks: compare `explicit_config` of the result."""
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
        **{key: getattr(config, key) for key in (*_PLAIN, *TOKENS)},
    )


def llama_config(config: TransformerConfig) -> LlamaConfig:
    """Return the Llama of these sizes. It drops parts that Llama lacks: compare `explicit_config` of the result."""
    scaling = {"rope_type": "default"} if config.llama3_rope is None else {"rope_type": "llama3", **config.llama3_rope}
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return LlamaConfig(
        head_dim=config.head_dim,
        attention_bias=config.attention_biases,
        mlp_bias=config.feed_forward_biases,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_theta": config.rope_base, **scaling},
        **{key: getattr(config, key) for key in (*_PLAIN, *TOKENS, *sizes)},
    )
