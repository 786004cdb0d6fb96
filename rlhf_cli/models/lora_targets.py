"""Which weights of a model get an adapter, and what an adapter on them does not reach or costs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter_layers import adapter_parameters, backbone
from rlhf_cli.models.backbone import decoder_of, text_config
from rlhf_cli.progress import say_once
from rlhf_cli.settings.shared import LoraSettings

# Names of linear layers that belong to a head even where a model nests them in its backbone; they get no adapter.
_HEADS = ("lm_head", "score", "classifier", "classification_head", "pooler", "qa_outputs")


def _output_layer(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


@dataclass(frozen=True)
class Targets:
    """What gets an adapter, by keys relative to the backbone: linear layers, and parameters (experts, ., .)."""

    layers: dict[str, nn.Module]
    experts: dict[str, nn.Parameter]

    def adapted(self) -> list[nn.Parameter]:
        """Return the weights that the adapter changes."""
        return [*(layer.weight for layer in self.layers.values()), *self.experts.values()]  # type: ignore[list-item]


def targets_of(model: nn.Module, lora: LoraSettings) -> Targets:
    """Select what `lora.target_modules` names; says what an adapter on all linear layers does not reach."""
    base, names = backbone(model), lora.target_modules
    names = [names] if isinstance(names, str) else names
    everything = _adaptable(base, head=_output_layer(model), inside=_text_modules(model))
    if names == ["all-linear"]:
        chosen = Targets(everything.layers, {} if lora.dropout else everything.experts)
        _say_coverage(model, chosen, has_dropout=bool(lora.dropout and everything.experts))
        return chosen
    known = [*everything.layers, *everything.experts]
    if missing := [name for name in names if not any(_is_named(key, name) for key in known)]:
        raise ModelError(
            f"`lora.target_modules`: {type(base).__name__} has no linear layer `{missing[0]}`",
            hint=f"its linear layers are: {', '.join(sorted({key.rsplit('.', 1)[-1] for key in known}))}",
        )
    layers, experts = (
        {key: one for key, one in every.items() if any(_is_named(key, name) for name in names)}
        for every in (everything.layers, everything.experts)
    )
    if experts and lora.dropout:
        raise ModelError(
            f"`lora.dropout`: an adapter on fused experts (`{next(iter(experts))}`) cannot have dropout",
            hint="set `lora.dropout` to 0, or leave the experts out of `lora.target_modules`",
        )
    return Targets(layers, experts)  # type: ignore[arg-type]


def _is_named(key: str, name: str) -> bool:
    return f".{key}".endswith(f".{name}")


def _adaptable(base: nn.Module, *, head: nn.Module | None, inside: Collection[nn.Module] | None) -> Targets:
    """Find all linear layers and fused experts of a backbone that an adapter can change."""
    found = Targets({}, {})
    adapted: tuple[str, ...] = ()
    read_directly: set[nn.Module] = set()
    for key, module in base.named_modules():
        if adapted and key.startswith(adapted):
            continue
        if isinstance(module, LoraLayer):  # adapted already: count the layer, not the factors inside it
            adapted = (*adapted, key + ".")
            module = module.get_base_layer()
        read_directly |= _read_directly(module)
        if module is head or any(part in _HEADS for part in key.split(".")) or module in read_directly:
            continue
        if inside is not None and module not in inside:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            if not _is_router(module):
                found.layers[key] = module
        elif "expert" in f"{key} {type(module).__name__}".lower():
            own = module.named_parameters(recurse=False)
            found.experts.update({f"{key}.{name}": weight for name, weight in own if weight.dim() == 3})
    return found


def _is_router(layer: nn.Module) -> bool:
    """Whether a layer is a router derived from a linear layer, which returns more than a product (Llama 4, Phi-MoE)."""
    return "router" in type(layer).__name__.lower()


def _read_directly(module: nn.Module) -> set[nn.Module]:
    """Return linear layers that a state-space mixer hands to its kernels as weights, without calling them.

    On a GPU these kernels would ignore an adapter.
    """
    if not hasattr(module, "A_log") or not hasattr(module, "D"):
        return set()
    return {layer for name, layer in module.named_children() if name in ("out_proj", "x_proj", "dt_proj")}


def _text_modules(model: nn.Module) -> set[nn.Module] | None:
    """Return the modules of the language model inside a multimodal model; None for other models."""
    if not isinstance(model, PreTrainedModel) or text_config(model.config) is model.config:
        return None
    # An adapted layer is counted by what it wraps.
    return {one.get_base_layer() if isinstance(one, LoraLayer) else one for one in decoder_of(model).modules()}


_WELL_COVERED = 0.9


def _say_coverage(model: nn.Module, targets: Targets, *, has_dropout: bool) -> None:
    """Say what share of the backbone's weights an adapter on all linear layers changes, if it is not nearly all."""
    adapted = {id(weight) for weight in targets.adapted()}
    inside = decoder_of(model) if _text_modules(model) is not None else backbone(model)  # type: ignore[arg-type]
    kept = {
        id(weight)
        for module in inside.modules()
        if isinstance(module, nn.Embedding | LoraLayer) or module is _output_layer(model)
        for weight in module.parameters(recurse=not isinstance(module, LoraLayer))
    }
    kept |= {id(weight) for weight in adapter_parameters(model)}
    weights = {name: one for name, one in inside.named_parameters() if id(one) not in kept and one.dim() > 1}
    total = sum(weight.numel() for weight in weights.values())
    covered = sum(weight.numel() for weight in weights.values() if id(weight) in adapted)
    if total == 0 or covered >= _WELL_COVERED * total:
        return
    rest = {name: weight for name, weight in weights.items() if id(weight) not in adapted}
    largest = max(rest, key=lambda name: rest[name].numel())
    way = "set `lora.dropout` to 0 to reach the experts" if has_dropout else "`adapter: none` trains all weights"
    say_once(
        f"the adapter covers {covered / total:.0%} of the backbone's matrices, but not, for example, `{largest}`; {way}"
    )


def say_cost_of_experts(targets: Targets) -> None:
    """Say what an adapter on fused experts costs, and how to train without."""
    if not targets.experts:
        return
    leaves = {key.rsplit(".", 1)[-1] for key in targets.layers}
    others = sorted(name for name in leaves if not any(_is_named(key, name) for key in targets.experts))
    way = f"; `lora.target_modules: [{', '.join(others)}]` leaves them out" if others else ""
    count = sum(weight.numel() for weight in targets.experts.values())
    say_once(
        f"the adapter changes fused experts ({count:,} weights): every training step computes them all, W + BA, and "
        f"keeps that copy for the backward pass{way}"
    )
