"""Measures which precision of matrix products is faster on this machine, for `model.precision: auto`.

Hardware with bfloat16 instructions is not enough: casts, norms and attention cost more under autocast, and in models of
a few million parameters they outweigh the products. So the trial is a whole transformer layer, not a product, and it
trains what the stage trains: an adapter adds small products and casts, and all weights add their gradients.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Literal

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from rlhf_cli.attention import hugging_face, registry
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.seeding import seeded
from rlhf_cli.models.split_weights import split_weights
from rlhf_cli.precision import autocast
from rlhf_cli.settings.shared import LoraSettings

Trains = Literal["nothing", "adapter", "all"]
"""Which weights of a layer are trained."""

_BATCH, _LENGTH = 4, 32
_LARGEST = 512
"""Largest width that is tried: the advantage of bfloat16 grows with the width, and so does the time of the trial."""
_ROUNDS = 5
_ADVANTAGE = 1.1
"""How many times as fast bfloat16 must be: times are noisy, and float32 is more accurate."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 natively (Ampere, AVX512-BF16, AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@lru_cache
def bfloat16_speed(device: torch.device, width: int, trains: Trains = "nothing") -> float:
    """Return how many times as fast as in float32 a layer is in bfloat16, forward and backward.

    Takes well under a second. Both precisions alternate, and the fastest round of each counts.

    Args:
        device: where the model computes.
        width: its hidden size.
        trains: which of its weights have gradients.
    """
    precisions = (torch.float32, torch.bfloat16)
    layers = [_layer(device, min(width, _LARGEST), precision, trains) for precision in precisions]
    rounds = [list(map(layer_seconds, layers, precisions)) for _ in range(_ROUNDS + 1)]
    float32, bfloat16 = map(min, zip(*rounds[1:], strict=True))  # the first round warms up
    return float32 / bfloat16


def faster_precision(device: torch.device, width: int, trains: Trains = "nothing") -> tuple[torch.dtype, str]:
    """Return the precision that `auto` takes for a model of this hidden size, and why; see `bfloat16_speed`."""
    if not has_bfloat16(device):
        return torch.float32, f"this {device.type} has no native bfloat16"
    speed = bfloat16_speed(device, width, trains)
    return (
        torch.bfloat16 if speed >= _ADVANTAGE else torch.float32,
        f"bfloat16 is {speed:.1f} times as fast as float32 here",
    )


def _layer(device: torch.device, width: int, dtype: torch.dtype, trains: Trains) -> LlamaModel:
    heads = max(1, width // 64)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=width // heads // 2 * heads * 2,
        intermediate_size=3 * width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        max_position_embeddings=_LENGTH,
    )
    with torch.device("meta"):
        model = LlamaModel(config)
    model = model.to_empty(device=device)
    for weight in [*model.parameters(), *model.buffers()]:
        weight.requires_grad_(False).fill_(0.01)
    model.set_attn_implementation(hugging_face.implementation(registry.AUTO))
    if trains == "all":
        model.requires_grad_(True)
        if dtype != torch.float32:
            split_weights(model)
        return model
    nn.Module.to(model, dtype)  # in place
    if trains == "adapter":
        with seeded(0, device):
            add_lora(model, LoraSettings())
    return model


def layer_seconds(layer: LlamaModel, precision: torch.dtype) -> float:
    """Time one forward and backward pass, to the embeddings and the trained weights.

    On a CPU this is processor time, which other programs on the machine change little: a trial must not depend on them.
    """
    device = layer.device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    inputs = torch.full((_BATCH, _LENGTH, layer.config.hidden_size), 0.1, device=device, dtype=layer.dtype)
    started = clock()
    with autocast(device, precision):
        output = layer(inputs_embeds=inputs.requires_grad_(), use_cache=False).last_hidden_state
    output.float().sum().backward()
    layer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started
