"""Low-rank adapters on the backbone of a model (Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) B A.

The experts of a mixture-of-experts model are mostly one parameter (experts, out, in), not linear layers. It gets A and
B per expert (PEFT's `target_parameters`), and its weight is W + (alpha / rank) B A in every forward pass.

Adapters are injected into the *backbone*, the model without its vocabulary projection or reward head. So one adapter
fits a causal language model, a bare decoder and a sequence classifier of the same architecture.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import ParamWrapper
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter_layers import WRAPPED, adapter_layers, adapter_parameters, backbone, factors_of
from rlhf_cli.models.fused_lora import fuse_products
from rlhf_cli.models.lora_targets import Targets, say_cost_of_experts, targets_of
from rlhf_cli.models.low_rank import join
from rlhf_cli.models.quantize import quantized
from rlhf_cli.settings.shared import LoraSettings


def add_lora(model: nn.Module, lora: LoraSettings, *, name: str = "default") -> list[nn.Parameter]:
    """Add a new adapter to the backbone's linear layers, in place; with B = 0 it changes no output until it is trained.

    The base weights are frozen. The adapter is float32, trainable and active. Adapters that the model carries already
    keep their weights and stay trainable or frozen. A is drawn from torch's global generator: for the same weights in
    every process, use `models.seeding.seeded`.

    Args:
        model: a language model, a classifier or a bare backbone.
        lora: rank, alpha, dropout and target modules.
        name: of the adapter, for several on one backbone.

    Returns:
        The adapter's parameters.

    Raises:
        ModelError: `lora.target_modules` names a layer that the model does not have.
    """
    base = backbone(model)
    targets = targets_of(model, lora)
    others = {parameter: parameter.requires_grad for parameter in adapter_parameters(model)}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  (annotated int, used as a factor)
        lora_dropout=lora.dropout,
        target_modules=sorted(targets.layers),
        target_parameters=sorted(targets.experts) or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in targets.layers.values()),
        bias="none",
    )
    with warnings.catch_warnings(), _quantization_flags(base), as_named(base):
        # PEFT warns when a second adapter is added, which is intended here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        try:
            inject_adapter_in_model(config, base, adapter_name=name)
        except ValueError as error:
            raise ModelError(
                f"PEFT cannot add an adapter to {type(base).__name__}: {error}",
                hint="name other layers in `lora.target_modules`, or train all weights (`adapter: none`)",
            ) from error
    _check_adapted(model, name, targets)
    fuse_products(layer for _, layer in adapter_layers(model, name))
    say_cost_of_experts(targets)
    added = [parameter for _, layer in adapter_layers(model, name) for parameter in factors_of(layer, name).values()]
    for parameter in model.parameters():
        parameter.requires_grad_(others.get(parameter, False))
    for parameter in added:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return added


@contextmanager
def _quantization_flags(base: nn.Module) -> Iterator[None]:
    """Set the flags by which PEFT sees whether the module it adapts, here the backbone, is quantized."""
    flags = {
        name: quantized(base) == bits for name, bits in (("is_loaded_in_4bit", "4bit"), ("is_loaded_in_8bit", "8bit"))
    }
    before = {name: getattr(base, name, False) for name in flags}
    for name, value in flags.items():
        setattr(base, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(base, name, value)


@contextmanager
def as_named(base: nn.Module) -> Iterator[None]:
    """Keep PEFT from renaming targets: by the model type it takes names for those of transformers 4.

    In mixture-of-experts models it would take the layers of shared experts for the fused experts, which have the same
    names.
    """
    config: PretrainedConfig | None = vars(base).get("config")
    if config is None:
        yield
        return
    nameless = copy.copy(config)
    vars(nameless)["model_type"] = ""
    vars(base)["config"] = nameless
    try:
        yield
    finally:
        vars(base)["config"] = config


def _check_adapted(model: nn.Module, name: str, targets: Targets) -> None:
    """Compare the layers that PEFT adapted with those that were asked for.

    Raises:
        ModelError: they differ.
    """
    found: set[str] = set()
    for key, layer in adapter_layers(model, name):
        key = key.replace(".base_layer", "")
        found.add(f"{key}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else key)
    if differing := sorted(found ^ {*targets.layers, *targets.experts}):
        problem = "was not asked for" if differing[0] in found else "got none"
        raise ModelError(
            f"the adapter is not on the layers it was asked for: `{differing[0]}` {problem} ({len(differing)} such "
            "layers)",
            hint="name other layers in `lora.target_modules`, or train all weights (`adapter: none`)",
        )


def merge_lora(model: nn.Module, name: str = "default", *, dtype: torch.dtype | None = None) -> None:
    """Merge an adapter into the weights it adapts and remove all adapters, in place.

    The sum W + (alpha / rank) B A is computed in float32 and rounded once, at the end, to `dtype`. So is that with the
    adapters that were merged into the weights on disk and split off at loading (`models.policy_adapter`).

    Args:
        model: a model that carries the adapter.
        name: of the adapter to merge; other adapters are dropped.
        dtype: of the whole model afterwards; None leaves adapted layers in float32 and other layers unchanged.

    Raises:
        ModelError: the model does not carry the adapter, or its weights are quantized.
    """
    if not adapter_layers(model, name):
        raise ModelError(f"cannot merge: the model has no adapter `{name}`")
    if quantized(model) != "none":
        raise ModelError(
            "cannot merge into quantized weights, which are rounded",
            hint="merge into the weights on disk, as `rlhf_cli.generation.policy_saving` does",
        )
    merge_layers(backbone(model), name)
    if dtype is not None:
        cast_weights(model, dtype)


@torch.no_grad()
def merge_layers(part: nn.Module, name: str = "default") -> None:
    """Merge an adapter into the weights of a backbone or a block of one, which may lack it; see `merge_lora`."""
    for key, layer in adapter_layers(part):
        plain = layer.get_base_layer()
        if name in layer.lora_A:
            weight = getattr(plain, layer.parameter_name if isinstance(layer, ParamWrapper) else "weight")
            weight.data = weight.data.float()
            weight.data += layer.get_delta_weight(name).float()  # type: ignore[operator]
        if not key.endswith(WRAPPED):
            parent, _, leaf = key.rpartition(".")
            setattr(part.get_submodule(parent), leaf, plain)
    for module in part.modules():
        join(module)
    if hasattr(part, "peft_config"):
        del part.peft_config


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters in place. Tied weights stay tied; buffers (rotary frequencies) are not cast."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
