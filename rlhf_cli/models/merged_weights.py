"""The weights of a model as its checkpoint would have them, active adapters merged, one layer at a time.

For programs that hold a model of their own, such as vLLM: they know the names of the checkpoint, and no adapters. The
model itself does not change, and no second copy of it exists. Sharded weights are gathered a layer at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlhf_cli.models.adapter_layers import adapter_layers
from rlhf_cli.models.low_rank import LowRankConv1D, LowRankLinear, low_rank_update
from rlhf_cli.models.sharding import whole


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each weight that a checkpoint of the model would hold.

    W + (alpha / rank) B A of an adapted layer is computed in float32 and not rounded; other weights are the model's own
    tensors. Fused experts are split as in the checkpoint. Tied weights come once. Of a sharded model every process
    iterates to the end, and gets each weight whole.

    Args:
        model: with any adapters; those that are active are merged. Not quantized.
    """
    weights, adapted, separated = plain_weights(model), adapted_weights(model), separated_layers(model)
    of_tied = {id(weight): name for name, weight in reversed(weights.items())}  # the first name of each

    def value(name: str) -> Tensor:
        weight = weights[name]
        layers = [layer for layer in adapted.get(id(weight), ()) if not layer.disable_adapters and not layer.merged]
        updates = [layer.get_delta_weight(name) for layer in layers for name in _active(layer)]  # type: ignore[operator]
        return updated(whole(weight), *updates, low_rank_update(separated.get(id(weight))))

    yield from as_stored(model, [name for name, weight in weights.items() if of_tied[id(weight)] == name], value)


def _active(layer: LoraLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def as_stored(
    model: PreTrainedModel, names: Iterable[str], value: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values that a checkpoint holds, one layer at a time.

    Args:
        model: says how its weights are stored.
        names: of its weights, those of a layer one after another.
        value: returns a weight by its name in the model, whole.
    """
    for _, layer in groupby(names, key=_layer_of):
        yield from revert_weight_conversion(model, {name: value(name) for name in layer}).items()


def _layer_of(name: str) -> str:
    """Return the name up to its first number, such as `model.layers.3`; the whole name outside of numbered layers."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else name


def updated(weight: Tensor, *updates: Tensor | None) -> Tensor:
    """Return the sum of a whole weight and its updates, added one after another in float32; itself without any."""
    for update in updates:
        if update is not None:
            weight = weight.float() + whole(update).to(weight.device).float()
    return weight


def plain_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return weights and buffers by the names they have without adapters, tied ones by each of their names."""
    factors = {
        id(weight)
        for _, layer in adapter_layers(model)
        for factor in (layer.lora_A, layer.lora_B)
        for weight in factor.parameters()
    }
    state = model.state_dict(keep_vars=True).items()
    return {plain_name(name): tensor for name, tensor in state if id(tensor) not in factors}


def plain_name(name: str) -> str:
    """Return the name that a weight has without adapters."""
    return re.sub(r"(\.base_layer)+\.", ".", name)  # PEFT wraps fused experts once per weight


def adapted_weights(model: nn.Module) -> dict[int, list[LoraLayer]]:
    """Return the adapted layers by the id of the weight that they adapt."""
    found: dict[int, list[LoraLayer]] = {}
    for _, layer in adapter_layers(model):
        name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        found.setdefault(id(getattr(layer.get_base_layer(), name)), []).append(layer)
    return found


def separated_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Return the layers whose update `models.low_rank` keeps apart, by the id of their weight."""
    layers = (layer for layer in model.modules() if isinstance(layer, LowRankLinear | LowRankConv1D))
    return {id(layer.weight): layer for layer in layers}
