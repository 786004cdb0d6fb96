"""Frozen weights in 4 or 8 bits under LoRA adapters (QLoRA; Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes.

What is quantized is the linear layers of the backbone. Embeddings, norms, heads and adapters keep their precision. A
quantized model trains and samples; what a stage writes is merged into the weights as they are on disk, never into the
rounded ones.
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
    """Raise `ModelError` unless bitsandbytes is here and quantizes on `device`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"`model.quantize: {how}` needs bitsandbytes, which is not installed",
            hint="pip install 'rlhf-cli[quantized]', or leave `model.quantize` out",
        )
    if (reason := _failure(how, device.type)) is not None:
        raise ModelError(
            f"bitsandbytes does not quantize to {how} on `{device.type}` here: {reason}",
            hint="leave `model.quantize` out, or choose another `model.device`",
        )


@cache
def _failure(how: Quantize, device: str) -> str | None:
    """Why a small product with quantized weights fails on a device; None where it works."""
    # It warns that inputs are rounded, once a product; that is what was asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]

        if how == "4bit":
            layer: nn.Module = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        else:
            layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        product = layer.to(device)(torch.ones(2, 64, device=device))
    except Exception as error:  # whatever a compiled library and its search for itself may raise
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return None if torch.isfinite(product).all() else "products are not finite"


def quantization(how: Quantize, precision: torch.dtype) -> BitsAndBytesConfig:
    """What transformers is told: NF4 with quantized constants and products in `precision`, or LLM.int8()."""
    if how == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision,
    )


def as_ordinary(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model that was loaded quantized one that trains as any other; its weights stay as they are."""
    # Trainers read these to refuse adapters outside PEFT's own wrapper, and to round trained weights to bfloat16.
    for flag in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(model, flag, False)
    # bitsandbytes packs 4-bit weights for AVX512-BF16 when a layer is used in evaluation mode, where ours are kept, and
    # the product with packed weights has no gradient: layers below would learn nothing, silently.
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010  (an attribute of its own kind alone)
    return model


def quantized(model: nn.Module) -> Quantize:
    """How the weights of a model, or of a layer, are held."""
    kinds = {_WEIGHTS.get(type(parameter).__name__) for parameter in model.parameters()}
    return "4bit" if "4bit" in kinds else "8bit" if "8bit" in kinds else "none"
