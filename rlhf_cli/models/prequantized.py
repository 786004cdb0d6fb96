"""Checkpoints whose weights are stored quantized: dequantized where that is exact and simple, else refused.

What the stages train and write is plain: an adapter is merged into weights, and weights of 8 or 4 bits would round it
away. So a checkpoint in FP8 (DeepSeek-V3, Qwen3-...-FP8) or MXFP4 (gpt-oss) is multiplied out when it is loaded, as
q * scale with one scale per block. Any other quantization is refused before anything is trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rlhf_cli.errors import ModelError
from rlhf_cli.models.stored_weights import StoredWeight

_SETTING = "quantization_config"
_SUFFIXES = {"fp8": ("", "_scale_inv"), "mxfp4": ("_blocks", "_scales")}
"""What is added to the name of a weight for its values and for its scales."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of 4-bit floats with 2 bits of exponent and 1 of mantissa; a fourth bit is the sign (OCP MX v1.0)."""
_ACTIVATION_SCALE = re.compile(r"[._](activation|input)_scale$")
_MX_BLOCK = 32
_BIAS = 127


@dataclass(frozen=True)
class Quantization:
    """How weights are stored: in 8 or 4 bits, with a scale for each block of them.

    Attributes:
        method: "fp8" or "mxfp4".
        block: rows and columns of a block of FP8; None if a weight has one scale.
    """

    method: str
    block: tuple[int, int] | None = None

    def plain_names(self, names: Iterable[str]) -> dict[str, str]:
        """Return the names of quantized weights without what says that they are quantized, by stored name."""
        values, scale = _SUFFIXES[self.method]
        stored = set(names)
        plain = {name: name.removesuffix(values) for name in stored if name.endswith(values)}
        return {name: short for name, short in plain.items() if short + scale in stored}

    def scales(self, path: str, weights: Mapping[str, StoredWeight]) -> dict[str, str]:
        """Return the name of the scale of each quantized weight.

        Args:
            path: for messages.
            weights: by plain names.

        Raises:
            ModelError: a weight in 8 or 4 bits has no scale.
        """
        suffix = _SUFFIXES[self.method][1]
        found = {name: name + suffix for name in weights if name + suffix in weights}
        known = {*found, *found.values()}
        if lonely := [n for n, weight in weights.items() if weight.dtype.startswith(("F8", "U8")) and n not in known]:
            raise ModelError(
                f"`{path}`: {len(lonely):,} weights are stored in 8 bits without a scale, such as `{lonely[0]}`",
                hint=UNQUANTIZED,
            )
        return found

    def activation_scales(self, names: Iterable[str]) -> set[str]:
        """Return the names of scales by which FP8 rounds the inputs of layers, where those are fixed.

        Inputs are not rounded here. The scale is stored beside the weight, `X.input_scale` beside `X.weight`.

        Args:
            names: plain names of all stored weights.
        """
        stored, suffix = set(names), _SUFFIXES[self.method][1]
        layers = {name: _ACTIVATION_SCALE.sub("", name) for name in stored if _ACTIVATION_SCALE.search(name)}
        return {n for n, layer in layers.items() if f"{layer}.weight{suffix}" in stored or layer + suffix in stored}

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a weight from that of its stored values."""
        if self.method == "fp8":
            return stored
        experts, rows, blocks, _ = stored
        return experts, blocks * _MX_BLOCK, rows

    def dequantize(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return a weight in float32 from its stored values and scales."""
        return from_fp8(values, scale, self.block) if self.method == "fp8" else from_mxfp4(values, scale)


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
    if method not in _SUFFIXES:
        raise ModelError(f"`{path}` is stored quantized (`quant_method: {method}`)", hint=UNQUANTIZED)
    block = fields.get("weight_block_size")
    return Quantization(method, None if block is None else (int(block[0]), int(block[1])))


def drop_quantization(config: PretrainedConfig) -> None:
    """Remove the setting: the model that is loaded, trained and written is not quantized."""
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, _SETTING):
            delattr(part, _SETTING)


def from_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
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


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return fused experts of gpt-oss in float32, (E, in, out).

    Args:
        blocks: (E, out, in / 32, 16) bytes, two 4-bit floats each, the lower half first.
        scales: (E, out, in / 32) exponents of 2, with a bias of 127.
    """
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    halves = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).int()  # (E, out, in / 32, 32)
    values = torch.ldexp(table[halves], (scales.int() - _BIAS)[..., None])
    return values.flatten(-2).transpose(1, 2).contiguous()
