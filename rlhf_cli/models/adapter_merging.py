"""Compute with the active adapter faster while no gradient is needed.

A completion is one forward pass per token. In each, PEFT computes two thin products per adapted layer, with casts and
look-ups, and the weight of fused experts, W + (alpha / rank) B A, whole and anew. Inside `merged_adapters`:

    fused experts                    W + (alpha / rank) B A is computed once, as PEFT computes it: the same bit for bit
    layers in float32                it is computed once, and takes the place of W: equal but for rounding in float32
    layers in bfloat16 or float16    the thin products stay, since W + (alpha / rank) B A would be rounded to 8 or 11
                                     bits, which loses a small update (docs/decisions/0010); their factors are cast once
    all others                       as they are: quantized layers, other kinds of adapters

Of a sharded model, which is whole in every process meanwhile, fused experts alone are merged.

Afterwards each weight is the tensor it was before, so that training sees no change of a bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import psutil  # a dependency of accelerate
import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from rlhf_cli.models.adapter_layers import adapter_layers
from rlhf_cli.models.sharding import is_sharded

_SHARE = 0.5
"""Share of the memory beside the model that the merged copy may take."""


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """Compute as the module's docstring says, for all forward passes in the context, which need no gradient.

    What is merged is a second copy of the adapted weights; where there is no memory for that, nothing is merged. Which
    adapter is active must not change inside the context, nor whether autocast is on.

    Args:
        model: with any adapters or none.
    """
    layers = [layer for _, layer in adapter_layers(model) if _is_active(layer)]
    divided = is_sharded(model)
    found = {layer: _mergeable(layer, divided=divided) for layer in layers}
    mergeable = {layer: weight for layer, weight in found.items() if weight is not None}
    uses = Counter(map(id, mergeable.values()))  # a weight of two layers cannot hold the sums of both
    mergeable = {layer: weight for layer, weight in mergeable.items() if uses[id(weight)] == 1}
    with ExitStack() as stack:
        for layer, weight in mergeable.items() if _fits(model, list(mergeable.values())) else ():
            stack.enter_context(_merged(layer, weight))
        for layer in layers:
            if isinstance(layer, Linear) and layer not in mergeable and _is_plain(layer):
                stack.enter_context(_lean(layer))
        yield


def _is_active(layer: LoraLayer) -> bool:
    has_active = any(name in layer.lora_A for name in layer.active_adapters)
    return has_active and not layer.disable_adapters and not layer.merged


def _is_plain(layer: LoraLayer) -> bool:
    """Whether a layer adds (alpha / rank) B A x and nothing else, for one active adapter."""
    name, *others = layer.active_adapters
    return not others and name not in layer.lora_variant and not layer.lora_bias[name]


def _mergeable(layer: LoraLayer, *, divided: bool) -> nn.Parameter | None:
    """Return the weight that B A is added to, if its sum with B A loses nothing."""
    if isinstance(layer, ParamWrapper):
        return layer.get_param()
    base = layer.get_base_layer()
    if divided or not isinstance(layer, Linear) or type(base) not in (nn.Linear, Conv1D) or not _is_plain(layer):
        return None
    weight = base.weight
    assert isinstance(weight, nn.Parameter)
    is_exact = weight.dtype == torch.float32 and not torch.is_autocast_enabled(weight.device.type)
    return weight if is_exact else None


def _fits(model: nn.Module, weights: list[nn.Parameter]) -> bool:
    """Whether the copies take at most `_SHARE` of the memory that the model leaves.

    By sizes alone: what is free at the moment differs from step to step, and a resumed run must decide as the first.
    """
    if not weights:
        return True
    needed = _bytes_of(weights)
    device = weights[0].device
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = psutil.virtual_memory().total
    return needed <= _SHARE * (total - _bytes_of(model.parameters()))


def _bytes_of(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


@contextmanager
def _merged(layer: LoraLayer, weight: nn.Parameter) -> Iterator[None]:
    original = weight.data
    weight.data = _sum(layer, weight)
    layer.merged_adapters.extend(layer.active_adapters)  # PEFT calls the module as it is then
    try:
        yield
    finally:
        weight.data = original
        layer.merged_adapters.clear()


@torch.no_grad()
def _sum(layer: LoraLayer, weight: nn.Parameter) -> Tensor:
    if isinstance(layer, ParamWrapper):
        with layer._activate_lora(layer.active_adapters):
            return getattr(layer.get_base_layer(), layer.parameter_name).detach().clone()
    assert isinstance(layer, Linear)
    return weight + layer.get_delta_weight(layer.active_adapters[0])


@contextmanager
def _lean(layer: Linear) -> Iterator[None]:
    """Replace PEFT's forward pass of a layer by the same products with factors that are cast already.

    Without autocast PEFT computes them in the factors' own precision, which this leaves as it is.
    """
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    kind = weight.device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    name, dtype = layer.active_adapters[0], torch.get_autocast_dtype(kind)
    a, b = (factors[name].get_parameter("weight").detach().to(dtype) for factors in (layer.lora_A, layer.lora_B))
    base = layer.get_base_layer()
    scale = layer.scaling[name]

    def forward(x: Tensor) -> Tensor:
        output = base(x)  # pyright: ignore[reportCallIssue]
        return torch.add(output, functional.linear(functional.linear(x.to(dtype), a), b), alpha=scale).to(output.dtype)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
