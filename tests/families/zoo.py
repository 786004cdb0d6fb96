"""Tiny random models of many families, by `model_type` of transformers: two layers of width 32 where a family allows.

A family is added with one line: its sizes, in its own names. Sizes make mistakes visible: windows and chunks shorter
than the texts, fewer key heads than query heads, several experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_cli.models.weight_loading import disable_dropout

POSITIONS = 256
_SCALE = 3.0
"""Of initial matrices: so small that a wrong mask or state would hardly change an output, they would hide mistakes."""
_WIDTH: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_KEYS: dict[str, Any] = _WIDTH | {"num_key_value_heads": 2}
_HEADS: dict[str, Any] = _KEYS | {"head_dim": 8}
_WINDOW: dict[str, Any] = _HEADS | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = _WIDTH | {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_DELTA: dict[str, Any] = _HEADS | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA2: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_SEQ2SEQ: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "patch_size": 4,
}

DECODERS: dict[str, dict[str, Any]] = {
    "apertus": _KEYS,
    "arcee": _KEYS,
    "bamba": _KEYS | _MAMBA2 | {"attn_layer_indices": [1], "mamba_chunk_size": 8},
    "biogpt": _WIDTH,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": _GPT | {"n_ctx": POSITIONS, "rotary_dim": 4},
    "cohere": _KEYS | {"logit_scale": 0.3},
    "cohere2": _KEYS | {"logit_scale": 0.3, "sliding_window": 8},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "ernie4_5": _HEADS,
    "ernie4_5_moe": _KEYS | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    "exaone4": _KEYS | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon_h1": _KEYS
    | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "gemma": _HEADS,
    "gemma2": _WINDOW,
    "gemma3": {
        "text_config": _WINDOW,
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 310,
        "boi_token_index": 311,
        "eoi_token_index": 312,
    },
    "gemma3_text": _WINDOW,
    "gemma4_text": _WINDOW
    | {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
        "num_kv_shared_layers": 0,
        "global_head_dim": 8,
    },
    "gemma4": {
        "text_config": _WINDOW
        | {
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 320,
            "num_kv_shared_layers": 0,
            "global_head_dim": 8,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        "audio_config": None,
    },
    "glm": _HEADS,
    "glm4": _HEADS,
    "glm4_moe": _HEADS
    | {
        k: _LATENT[k]
        for k in (
            "n_routed_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "n_group",
            "topk_group",
            "first_k_dense_replace",
        )
    },
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": POSITIONS,
    },
    "gpt_neox": _WIDTH,
    "gpt_oss": _WINDOW | _LOCAL_EXPERTS,
    "gptj": _GPT | {"rotary_dim": 8},
    "granite": _KEYS
    | {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "granitemoe": _KEYS | _LOCAL_EXPERTS,
    "granitemoehybrid": _KEYS
    | _LOCAL_EXPERTS
    | _MAMBA2
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16, "mamba_chunk_size": 8},
    "helium": _HEADS,
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS | {"num_experts": 4, "moe_topk": 2},
    "jamba": _KEYS
    | {
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": _KEYS | {"layer_types": ["conv", "full_attention"]},
    "llama": _KEYS,
    "llama4": {
        "text_config": _HEADS | _LOCAL_EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": 8},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
    "llama4_text": _HEADS | _LOCAL_EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "ministral": _WINDOW,
    "ministral3": _HEADS,
    "mistral": _KEYS | {"sliding_window": 8},
    "mistral3": {
        "text_config": {"model_type": "mistral"} | _HEADS,
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 28,
            "patch_size": 14,
        },
        "image_token_index": 310,
    },
    "mixtral": _KEYS | _LOCAL_EXPERTS,
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": POSITIONS},
    "nemotron": _KEYS,
    "nemotron_h": _HEADS
    | {
        "layers_block_type": ["mamba", "attention", "moe"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo": _KEYS,
    "olmo2": _KEYS,
    "olmo3": _WINDOW,
    "olmoe": _KEYS | {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "word_embed_proj_dim": 32,
    },
    "phi": _WIDTH,
    "phi3": _KEYS | {"sliding_window": 8},
    "phimoe": _KEYS | _LOCAL_EXPERTS,
    "qwen2": _KEYS,
    "qwen2_moe": _KEYS | _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3": _HEADS,
    "qwen3_5": {"text_config": _DELTA, "vision_config": _QWEN_VISION},
    "qwen3_5_moe": {
        "text_config": _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 16},
        "vision_config": _QWEN_VISION,
    },
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": _HEADS | _EXPERTS,
    "qwen3_next": _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 16},
    "recurrent_gemma": _HEADS
    | {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": POSITIONS},
    "seed_oss": _HEADS,
    "smollm3": _KEYS,
    "stablelm": _KEYS,
    "starcoder2": _KEYS | {"sliding_window": 8},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": POSITIONS},
    "zamba2": _KEYS
    | {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 1,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "chunk_size": 8,
        "adapter_rank": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
}
"""Decoder-only language models."""

ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "bart": _SEQ2SEQ,
    "marian": _SEQ2SEQ,
    "mt5": _T5,
    "pegasus": _SEQ2SEQ,
    "switch_transformers": _T5 | {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "t5": _T5,
    "umt5": _T5,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _WIDTH,
    "deberta-v2": _WIDTH
    | {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 32,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "type_vocab_size": 0,
        "position_biased_input": False,
    },
    "electra": _WIDTH | {"embedding_size": 32},
    "modernbert": _WIDTH | {"local_attention": 8, "global_attn_every_n_layers": 2},
    "roberta": _WIDTH,
}
NESTED = frozenset(family for family, sizes in DECODERS.items() if "text_config" in sizes)
"""Multimodal families, whose text attributes are in a nested configuration. They are stored whole, images included."""
FAMILIES = DECODERS | ENCODER_DECODERS | ENCODERS


def config_of(family: str, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The configuration of a family's tiny model, for a tokenizer that has an end and a pad token."""
    own = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.eos_token_id,
    }
    sizes = FAMILIES[family]
    if family in ENCODER_DECODERS:
        own["decoder_start_token_id"] = tokenizer.pad_token_id
    if family in ENCODERS:
        own |= {"cls_token_id": tokenizer.eos_token_id, "sep_token_id": tokenizer.eos_token_id}
    if family in NESTED:
        return AutoConfig.for_model(family, **{**sizes, "text_config": sizes["text_config"] | own})
    return AutoConfig.for_model(family, **{**sizes, **own})


def save_tiny(family: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write a family's tiny model and the tokenizer to a folder."""
    tiny_model(family, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_model(family: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Make a family's tiny model, without dropout, in evaluation mode."""
    kind = AutoModelForCausalLM
    if family in ENCODERS:
        kind = AutoModelForMaskedLM
    elif family in ENCODER_DECODERS:
        kind = AutoModelForSeq2SeqLM
    elif family in NESTED:
        kind = AutoModelForImageTextToText
    config = config_of(family, tokenizer)
    disable_dropout(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(_SCALE)
    return model
