"""Merge the active adapter into fused experts while no gradient is needed.

PEFT computes the weight of fused experts, W + (alpha / rank) B A, whole and anew in every forward pass. A completion is
one forward pass per token, so sampling would spend most of its time on that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import ParamWrapper
from torch import nn

from rlhf_cli.models.lora import adapter_layers

_SHARE = 0.5
"""Share of the free memory of a GPU that the merged copy may take."""


@contextmanager
def merged_experts(model: nn.Module) -> Iterator[None]:
    """Compute the adapted weights of fused experts once for all forward passes in the context, which need no gradient.

    The results are the same bit for bit: PEFT computes the weights as it does in a forward pass. They are a second copy
    of all adapted experts; where a GPU has no memory for that, nothing is merged. Which adapter is active must not
    change inside the context.

    Args:
        model: with any adapters or none.
    """
    layers = [layer for _, layer in adapter_layers(model) if isinstance(layer, ParamWrapper) and _is_active(layer)]
    kept: list[tuple[ParamWrapper, nn.Parameter, torch.Tensor]] = []
    try:
        for layer in layers if _fits([layer.get_param() for layer in layers]) else ():
            with torch.no_grad(), layer._activate_lora(layer.active_adapters):
                merged = getattr(layer.get_base_layer(), layer.parameter_name).detach().clone()
            weight = layer.get_param()
            kept.append((layer, weight, weight.data))
            weight.data = merged
            layer.merged_adapters.extend(layer.active_adapters)  # PEFT calls the module as it is then
        yield
    finally:
        for layer, weight, original in kept:
            weight.data = original
            layer.merged_adapters.clear()


def _is_active(layer: ParamWrapper) -> bool:
    has_active = any(name in layer.lora_A for name in layer.active_adapters)
    return has_active and not layer.disable_adapters and not layer.merged


def _fits(weights: list[nn.Parameter]) -> bool:
    needed = sum(weight.numel() * weight.element_size() for weight in weights)
    if not weights or weights[0].device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(weights[0].device)
    return needed <= _SHARE * free
