"""Tiny random models of every supported model family, for `rlhf attention verify`.

Their sizes make mistakes visible: fewer key heads than query heads where the family has grouped-query attention,
windows shorter than the sequences, and weights so large that a wrong mask changes the output far more than rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

VOCAB_SIZE = 61
_WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_POSITIONS = {"max_position_embeddings": 64}
_GROUPED: dict[str, Any] = {**_WIDTH, **_POSITIONS, "num_key_value_heads": 2, "head_dim": 8}
_WINDOWED = {**_GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

SUPPORTED: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 4},
    "gemma2": {**_WINDOWED, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_WINDOWED, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**_WIDTH, **_POSITIONS},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        **_POSITIONS,
    },
    "gpt_oss": {**_WINDOWED, "num_local_experts": 2, "num_experts_per_tok": 1},
    "bert": {**_WIDTH, **_POSITIONS},
    "roberta": {**_WIDTH, **_POSITIONS},
    "modernbert": {**_WIDTH, **_POSITIONS, "local_attention": 6, "global_attn_every_n_layers": 2},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, **_POSITIONS},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        **_POSITIONS,
    },
}
"""Configuration of a tiny model per family, by `model_type` of transformers."""

UNSUPPORTED: dict[str, dict[str, Any]] = {
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        **_POSITIONS,
    },
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "deberta-v2": {**_WIDTH, **_POSITIONS},
}
"""Families that ignore transformers' attention interface."""


def tiny_model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """Build a tiny model with random weights, in evaluation mode.

    Args:
        family: a key of `SUPPORTED` or `UNSUPPORTED`.
        seed: random seed of the weights.
    """
    config = AutoConfig.for_model(family, vocab_size=VOCAB_SIZE, **{**_SPECIAL, **(SUPPORTED | UNSUPPORTED)[family]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config)
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.4 if parameter.dim() > 1 else 0.1)
    return model.eval()
