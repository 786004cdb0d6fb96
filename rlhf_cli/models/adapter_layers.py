"""The adapters that a model carries: their layers and weights, by keys relative to its backbone.

A key is such as `layers.0.self_attn.q_proj.lora_A.weight`, whichever head the model has.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.sharding import assign


def backbone(model: nn.Module) -> nn.Module:
    """Return the model under the head: `LlamaModel` of a `LlamaForCausalLM`, or T5 itself, which nests its head."""
    return model.base_model if isinstance(model, PreTrainedModel) else model


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all adapters on the backbone."""
    return [
        weight
        for _, layer in adapter_layers(model)
        for name in layer.lora_A
        for weight in factors_of(layer, name).values()
    ]


def factors_of(layer: LoraLayer, name: str) -> dict[str, nn.Parameter]:
    """Return A (rank, in) and B (out, rank) of one layer."""
    return {"lora_A.weight": layer.lora_A[name].weight, "lora_B.weight": layer.lora_B[name].weight}  # type: ignore[dict-item]


def adapter_layers(model: nn.Module, name: str | None = None) -> list[tuple[str, LoraLayer]]:
    """Return adapted layers with their keys relative to the backbone; with `name`, only those with that adapter."""
    return [
        (key, module)
        for key, module in backbone(model).named_modules()
        if isinstance(module, LoraLayer) and (name is None or name in module.lora_A)
    ]


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return the adapter's weights by keys relative to the backbone. The tensors are the model's own, not copies."""
    return {
        f"{key}.{factor}": weight.detach()
        for key, layer in adapter_layers(model, name)
        for factor, weight in factors_of(layer, name).items()
    }


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Copy weights into an adapter that the model carries.

    Raises:
        ModelError: layers or shapes differ.
    """
    own = adapter_state(model, name)
    if differing := sorted(own.keys() ^ state.keys()):
        problem = "is missing" if differing[0] in own else "is not in the model"
        raise ModelError(
            f"the adapter does not fit the model: `{differing[0]}` {problem} ({len(differing)} such weights)"
        )
    for key, weight in own.items():
        if weight.shape != state[key].shape:
            raise ModelError(
                f"the adapter does not fit the model: `{key}` must have shape {tuple(weight.shape)}, "
                f"got {tuple(state[key].shape)}"
            )
    with torch.no_grad():
        for key, weight in own.items():
            assign(weight, state[key])


WRAPPED = ".base_layer"
"""What PEFT puts into the name of a layer inside another: of fused experts that have several adapted parameters."""
