"""Checkpoints whose weights are stored quantized: dequantized where that is exact and simple, else refused.

What the stages train and write is plain: an adapter is merged into weights, and weights of 8 or 4 bits would round it
away. So a checkpoint in FP8 (DeepSeek-V3, Qwen3-...-FP8) is multiplied out when it is loaded, w = q * scale with one
scale per block, and any other quantization is refused before anything is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rlhf_cli.errors import ModelError
from rlhf_cli.models.stored_weights import StoredWeight

_SETTING = "quantization_config"
_SCALE = "_scale_inv"


@dataclass(frozen=True)
class Quantization:
    """FP8: each weight is stored as `float8` and each block of it has a scale.

    Attributes:
        block: rows and columns of a block; None if a weight has one scale.
    """

    block: tuple[int, int] | None

    def scales(self, path: str, weights: Mapping[str, StoredWeight]) -> dict[str, str]:
        """Return the name of the scale of each quantized weight.

        Raises:
            ModelError: a weight in 8 bits has no scale, or a scale has no weight.
        """
        found = {name: name + _SCALE for name in weights if name + _SCALE in weights}
        lonely = [name for name, weight in weights.items() if weight.dtype.startswith("F8") and name not in found]
        lonely = [name for name in lonely if name not in found.values()]
        if lonely:
            raise ModelError(
                f"`{path}`: {len(lonely):,} weights are stored in 8 bits without a scale, such as `{lonely[0]}`",
                hint=UNQUANTIZED,
            )
        return found


UNQUANTIZED = "give the unquantized model; `--set model.quantize=4bit` quantizes it under an adapter"


def quantization_of(config: PretrainedConfig, path: str) -> Quantization | None:
    """Return how a configuration says that the weights are stored; None if they are not quantized.

    Raises:
        ModelError: they are quantized in a way that is not dequantized here.
    """
    parts = (config, config.get_text_config(decoder=True))
    given = next((found for part in parts if (found := getattr(part, _SETTING, None))), None)
    if given is None:
        return None
    fields: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
    if method != "fp8":
        raise ModelError(f"`{path}` is stored quantized (`quant_method: {method}`)", hint=UNQUANTIZED)
    block = fields.get("weight_block_size")
    return Quantization(None if block is None else (int(block[0]), int(block[1])))


def drop_quantization(config: PretrainedConfig) -> None:
    """Remove the setting: the model that is loaded, trained and written is not quantized."""
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, _SETTING):
            delattr(part, _SETTING)


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Return q * scale in float32.

    Args:
        weight: (..., out, in) in 8 bits.
        scale: one number, or (..., out / rows, in / columns), rounded up.
        block: rows and columns that share a scale.
    """
    scale = scale.to(torch.float32)
    if block is not None and scale.dim() >= 2:
        rows, columns = block
        scale = scale.repeat_interleave(rows, dim=-2).repeat_interleave(columns, dim=-1)
        scale = scale[..., : weight.shape[-2], : weight.shape[-1]]
    return weight.to(torch.float32) * scale
