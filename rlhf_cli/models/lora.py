"""Low-rank adapters on the backbone of a model (Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) B A.

The experts of a mixture-of-experts model are mostly one parameter (experts, out, in), not linear layers. It gets A and
B per expert (PEFT's `target_parameters`), and its weight is W + (alpha / rank) B A in every forward pass.

Adapters are injected into the *backbone*, the model without its vocabulary projection or reward head. So one adapter
fits a causal language model, a bare decoder and a sequence classifier of the same architecture. Its keys are relative
to the backbone: `layers.0.self_attn.q_proj.lora_A.weight`.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_cli.errors import ModelError
from rlhf_cli.models.backbone import decoder_of, text_config
from rlhf_cli.models.fused_lora import fuse_products
from rlhf_cli.models.json_files import read_json
from rlhf_cli.models.low_rank import join
from rlhf_cli.models.peft_folder import ADAPTER_CONFIG
from rlhf_cli.models.quantize import quantized
from rlhf_cli.progress import say_once
from rlhf_cli.settings.shared import LoraSettings

ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Names of linear layers that belong to a head even where a model nests them in its backbone; they get no adapter.
_HEADS = ("lm_head", "score", "classifier", "classification_head", "pooler", "qa_outputs")


def backbone(model: nn.Module) -> nn.Module:
    """Return the model under the head: `LlamaModel` of a `LlamaForCausalLM`, or T5 itself, which nests its head."""
    return model.base_model if isinstance(model, PreTrainedModel) else model


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
    targets = _targets(model, lora)
    others = {parameter: parameter.requires_grad for parameter in _adapter_parameters(model)}
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
    _say_cost_of_experts(targets)
    added = [parameter for _, layer in adapter_layers(model, name) for parameter in _factors(layer, name).values()]
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


def _output_layer(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


@dataclass(frozen=True)
class _Targets:
    """What gets an adapter, by keys relative to the backbone: linear layers, and parameters (experts, ., .)."""

    layers: dict[str, nn.Module]
    experts: dict[str, nn.Parameter]

    def adapted(self) -> list[nn.Parameter]:
        """Return the weights that the adapter changes."""
        return [*(layer.weight for layer in self.layers.values()), *self.experts.values()]  # type: ignore[list-item]


def _targets(model: nn.Module, lora: LoraSettings) -> _Targets:
    """Select what `lora.target_modules` names; says what an adapter on all linear layers does not reach."""
    base, names = backbone(model), lora.target_modules
    names = [names] if isinstance(names, str) else names
    everything = _adaptable(base, head=_output_layer(model), inside=_text_modules(model))
    if names == ["all-linear"]:
        chosen = _Targets(everything.layers, {} if lora.dropout else everything.experts)
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
    return _Targets(layers, experts)  # type: ignore[arg-type]


def _is_named(key: str, name: str) -> bool:
    return f".{key}".endswith(f".{name}")


def _adaptable(base: nn.Module, *, head: nn.Module | None, inside: Collection[nn.Module] | None) -> _Targets:
    """Find all linear layers and fused experts of a backbone that an adapter can change."""
    found = _Targets({}, {})
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


def _say_coverage(model: nn.Module, targets: _Targets, *, has_dropout: bool) -> None:
    """Say what share of the backbone's weights an adapter on all linear layers changes, if it is not nearly all."""
    adapted = {id(weight) for weight in targets.adapted()}
    inside = decoder_of(model) if _text_modules(model) is not None else backbone(model)  # type: ignore[arg-type]
    kept = {
        id(weight)
        for module in inside.modules()
        if isinstance(module, nn.Embedding | LoraLayer) or module is _output_layer(model)
        for weight in module.parameters(recurse=not isinstance(module, LoraLayer))
    }
    kept |= {id(weight) for weight in _adapter_parameters(model)}
    weights = {name: one for name, one in inside.named_parameters() if id(one) not in kept and one.dim() > 1}
    total = sum(weight.numel() for weight in weights.values())
    covered = sum(weight.numel() for weight in weights.values() if id(weight) in adapted)
    if total == 0 or covered >= _WELL_COVERED * total:
        return
    rest = {name: weight for name, weight in weights.items() if id(weight) not in adapted}
    largest = max(rest, key=lambda name: rest[name].numel())
    way = "set `lora.dropout` to 0 to reach the experts" if has_dropout else "`adapter: none` trains all weights"
    say_once(
        f"the adapter reaches {covered / total:.0%} of the backbone's matrices, not those such as `{largest}`; {way}"
    )


def _say_cost_of_experts(targets: _Targets) -> None:
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


def _check_adapted(model: nn.Module, name: str, targets: _Targets) -> None:
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


def _adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all adapters on the backbone."""
    return [
        weight
        for _, layer in adapter_layers(model)
        for name in layer.lora_A
        for weight in _factors(layer, name).values()
    ]


def _factors(layer: LoraLayer, name: str) -> dict[str, nn.Parameter]:
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
        for factor, weight in _factors(layer, name).items()
    }


def load_adapter_state(model: nn.Module, state: dict[str, Tensor], name: str = "default") -> None:
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
            weight.copy_(state[key])


def save_adapter(
    model: nn.Module, folder: Path, name: str = "default", *, base: str | None = None, revision: str | None = None
) -> None:
    """Write an adapter in PEFT's format, for `PeftModel.from_pretrained(model_of_the_same_class, folder)`.

    Args:
        model: a model that carries the adapter.
        folder: created if it does not exist.
        name: of the adapter.
        base: path or hub id of the base model, recorded in the adapter's configuration.
        revision: of a base on the hub, recorded there too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: LoraConfig = backbone(model).peft_config[name]  # type: ignore[index,assignment]
    content = config.to_dict() | {"base_model_name_or_path": base, "revision": revision, "inference_mode": True}
    content["target_modules"] = sorted(content["target_modules"])
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    prefix = _PEFT_PREFIX + _backbone_prefix(model)
    state = {prefix + key: weight.cpu().contiguous() for key, weight in adapter_state(model, name).items()}
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


_PEFT_PREFIX = "base_model.model."


def _backbone_prefix(model: nn.Module) -> str:
    base = backbone(model)
    return next((key + "." for key, module in model.named_modules() if key and module is base), "")


def load_adapter(model: nn.Module, folder: Path, name: str = "default") -> list[nn.Parameter]:
    """Load a saved adapter onto a model's backbone, whichever head the model had in training.

    Dropout is not restored: it applied to that training only, and PPO's forward passes must agree with one another.

    Returns:
        The adapter's parameters, trainable.

    Raises:
        ModelError: `folder` holds no adapter, or one for another architecture.
    """
    lora, state = read_adapter(model, folder)
    parameters = add_lora(model, lora, name=name)
    load_adapter_state(model, state, name)
    return parameters


def read_adapter(model: nn.Module, folder: Path) -> tuple[LoraSettings, dict[str, Tensor]]:
    """Read a saved adapter: its settings without dropout, and its weights by keys relative to the backbone of `model`.

    Raises:
        ModelError: `folder` holds no adapter, or one for another architecture.
    """
    rank, alpha = read_adapter_config(folder)
    try:
        stored = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"cannot load an adapter from {folder}: {error}", hint="copy the adapter again") from error
    base_keys = {key.replace(_WRAPPED, "") for key, _ in backbone(model).named_modules()}
    state = {_relative_key(key, base_keys, folder): weight for key, weight in stored.items()}
    keys = {key.rsplit(".", 2)[0].replace(_WRAPPED, "") for key in state}
    layers = sorted(key for key in keys if _is_linear(backbone(model), key))
    check_targets(folder, layers)
    for name, weight in state.items():
        is_layer = name.rsplit(".", 2)[0] in layers  # the factors of fused experts have rank x experts rows
        if is_layer and (weight.dim() != 2 or weight.shape[name.endswith("lora_B.weight")] != rank):
            raise ModelError(
                f"{folder}: `{name}` has shape {tuple(weight.shape)}, and {ADAPTER_CONFIG} says `r` is {rank}",
                hint=f"give the {ADAPTER_CONFIG} that belongs to the weights",
            )
    names = layers + sorted(read_json(folder / ADAPTER_CONFIG).get("target_parameters") or [])
    return LoraSettings(rank=rank, alpha=alpha, target_modules=names), state


_FREE = (
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode"),
    *(
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "target_parameters",
        "fan_in_fan_out",
        "init_lora_weights",
        "exclude_modules",
    ),
)
"""Fields of PEFT's configuration with which an adapter is W + (alpha / rank) B A, whatever their value."""


def check_targets(folder: Path, layers: list[str]) -> None:
    """Check that the configuration of a saved adapter names the layers and experts that it has weights for."""
    config = read_json(folder / ADAPTER_CONFIG)
    given = config.get("target_modules")
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{folder / ADAPTER_CONFIG}: `target_modules` cannot be {given!r}", hint="copy the file again")
    known = [*names, *(str(name).rpartition(".")[0] for name in config.get("target_parameters") or ())]
    plain = [layer.replace(_WRAPPED, "") for layer in layers]
    missing = [layer for layer in plain if not any(f".{layer}".endswith(f".{name}") for name in known)]
    if missing and names != ["all-linear"]:
        raise ModelError(
            f"{folder}: there are weights for `{missing[0]}`, which `target_modules` in {ADAPTER_CONFIG} does not name",
            hint=f"give the {ADAPTER_CONFIG} that belongs to the weights",
        )


def read_adapter_config(folder: Path) -> tuple[int, float]:
    """Read rank and alpha of a saved adapter.

    Raises:
        ModelError: there is no adapter, its configuration is damaged, or it is not a plain LoRA.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise ModelError(
            f"cannot load an adapter from {folder}: it has no {ADAPTER_CONFIG}", hint="copy the adapter again"
        )
    config = read_json(path)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    are_numbers = all(isinstance(one, int | float) and not isinstance(one, bool) and one > 0 for one in (rank, alpha))
    if not are_numbers or not isinstance(rank, int) or not math.isfinite(alpha or 0):
        raise ModelError(f"{path} is damaged: `r` is {rank} and `lora_alpha` is {alpha}", hint="copy the file again")
    usual = LoraConfig().to_dict()
    if other := [name for name, value in config.items() if name not in _FREE and value != usual.get(name, value)]:
        raise ModelError(
            f"{path}: `{other[0]}` is {config[other[0]]!r}, and only plain LoRA is read here",
            hint="merge the adapter with PEFT first",
        )
    return rank, float(alpha or 0)


_WRAPPED = ".base_layer"
"""What PEFT puts into the name of a layer inside another: of fused experts that have several adapted parameters."""


def _is_linear(base: nn.Module, key: str) -> bool:
    module = base.get_submodule(key)
    return isinstance(module.get_base_layer() if isinstance(module, LoraLayer) else module, nn.Linear | Conv1D)


def _relative_key(key: str, base_keys: set[str], folder: Path) -> str:
    """Make a key relative to the backbone: `base_model.model.model.layers.0...` -> `layers.0...`."""
    parts = key.split(".")
    for start in range(len(parts) - 2):
        if ".".join(part for part in parts[start:-2] if f".{part}" != _WRAPPED) in base_keys:
            return ".".join(parts[start:])
    raise ModelError(
        f"the adapter in {folder} does not fit the model: the model has no layer for `{key}`",
        hint="give the model that the adapter was trained on",
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
    base = backbone(model)
    layers = adapter_layers(model)
    if not any(name in layer.lora_A for _, layer in layers):
        raise ModelError(f"cannot merge: the model has no adapter `{name}`")
    if quantized(model) != "none":
        raise ModelError(
            "cannot merge into quantized weights, which are rounded",
            hint="merge into the weights on disk, as `rlhf_cli.generation.policy_saving` does",
        )
    with torch.no_grad():
        for key, layer in layers:
            plain = layer.get_base_layer()
            if name in layer.lora_A:
                weight = getattr(plain, layer.parameter_name if isinstance(layer, ParamWrapper) else "weight")
                weight.data = weight.data.float()
                weight.data += layer.get_delta_weight(name).float()  # type: ignore[operator]
            if not key.endswith(_WRAPPED):
                parent, _, leaf = key.rpartition(".")
                setattr(base.get_submodule(parent), leaf, plain)
        for module in base.modules():
            join(module)
    if hasattr(base, "peft_config"):
        del base.peft_config
    if dtype is not None:
        cast_weights(model, dtype)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters in place. Tied weights stay tied; buffers (rotary frequencies) are not cast."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
