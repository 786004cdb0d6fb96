"""Quantize frozen weights under LoRA adapters to 4 or 8 bits (QLoRA; Dettmers et al. 2023, arXiv:2305.14314).

bitsandbytes quantizes the linear layers of the backbone. Embeddings, norms, heads and adapters keep their precision. A
quantized model can train and sample. A stage merges the adapter into the weights on disk, never into quantized ones.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from rlhf_cli.errors import ModelError

Quantize = Literal["none", "4bit", "8bit"]

_WEIGHTS = {"Params4bit": "4bit", "Int8Params": "8bit"}


def check_quantize(how: Quantize, device: torch.device) -> None:
    """Check that bitsandbytes can quantize on a device.

    Raises:
        ModelError: bitsandbytes is not installed, or a small product with quantized weights fails.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"`model.quantize: {how}` needs bitsandbytes, which is not installed",
            hint="run `pip install 'rlhf-cli[quantized]'`, or use `--set model.quantize=none`",
        )
    if (reason := failure_reason(how, device.type)) is not None:
        raise ModelError(
            f"`model.quantize: {how}`: bitsandbytes fails on `{device.type}`: {reason}",
            hint="use `--set model.quantize=none`, or another `model.device`",
        )


@cache
def failure_reason(how: Quantize, device: str) -> str | None:
    """Return why a small product with quantized weights fails on a device; None if it works."""
    # bitsandbytes warns at every product that it casts the inputs, which is intended.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt  # pyright: ignore[reportMissingImports]

        if how == "4bit":
            layer: nn.Module = Linear4bit(64, 64, bias=False, quant_type="nf4")
        else:
            layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        product = layer.to(device)(torch.ones(2, 64, device=device))
    except Exception as error:  # a compiled library can raise anything
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return None if torch.isfinite(product).all() else "products are not finite"


def quantization(how: Quantize, precision: torch.dtype) -> BitsAndBytesConfig:
    """Return the configuration for transformers: LLM.int8(), or NF4 with double quantization and `precision`."""
    if how == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision,
    )


def make_trainable(model: PreTrainedModel) -> PreTrainedModel:
    """Let a quantized model train adapters like any other model; its weights do not change."""
    # Libraries read these flags to refuse adapters outside PEFT's own wrapper and to cast trained weights to bfloat16.
    for flag in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(model, flag, False)
    # On AVX512-BF16, bitsandbytes packs the 4-bit weights of layers in evaluation mode, as ours are. A product with
    # packed weights has no gradient, so the layers below would silently learn nothing.
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010  (only bitsandbytes layers have it)
    return model


def quantized(model: nn.Module) -> Quantize:
    """Return how the weights of a model or layer are quantized."""
    kinds = {_WEIGHTS.get(type(parameter).__name__) for parameter in model.parameters()}
    return "4bit" if "4bit" in kinds else "8bit" if "8bit" in kinds else "none"
