"""The weights of a model as its checkpoint would have them, active adapters merged, one layer at a time.

For programs that hold a model of their own, such as vLLM: they know the names of the checkpoint, and no adapters. The
model itself does not change, and no second copy of it exists. Sharded weights are gathered a layer at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    state = _plain_state(model)
    updates = _Updates(model)
    for _, names in groupby(state, key=layer_of):
        layer = {name: updates.applied(state[name]) for name in names}
        yield from revert_weight_conversion(model, layer).items()


def _plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Stored weights by the names they have without adapters; of tied weights the first."""
    factors = {id(weight) for _, layer in adapter_layers(model) for weight in _factors(layer)}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in factors | seen:
            seen.add(id(tensor))
            found[name.replace(".base_layer", "")] = tensor
    return found


def _factors(layer: LoraLayer) -> list[nn.Parameter]:
    return [weight for factor in (layer.lora_A, layer.lora_B) for weight in factor.parameters()]


def layer_of(name: str) -> str:
    """Return the name up to its first number, such as `model.layers.3`; the whole name outside of numbered layers."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else name


class _Updates:
    """What is added to weights: active adapters, and updates that `models.low_rank` keeps apart."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._adapters: dict[int, list[LoraLayer]] = {}
        for _, layer in adapter_layers(model):
            if not layer.disable_adapters and not layer.merged:
                name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
                weight = getattr(layer.get_base_layer(), name)
                self._adapters.setdefault(id(weight), []).append(layer)
        separated = (layer for layer in model.modules() if isinstance(layer, LowRankLinear | LowRankConv1D))
        self._separated = {id(layer.weight): layer for layer in separated}

    def applied(self, weight: Tensor) -> Tensor:
        """The sum of a weight and its updates in float32; the weight itself if it has none."""
        layers, separated = self._adapters.get(id(weight), []), self._separated.get(id(weight))
        deltas = [layer.get_delta_weight(name) for layer in layers for name in _active(layer)]  # type: ignore[attr-defined]
        if separated is not None:
            deltas.append(low_rank_update(separated))
        plain = whole(weight)
        for delta in deltas:
            plain = plain.float() + whole(delta).float()  # type: ignore[arg-type]
        return plain


def _active(layer: LoraLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]
