"""Adapters on disk, in PEFT's format: written for the class of the model, read onto any backbone that fits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter_layers import WRAPPED, adapter_state, backbone, load_adapter_state
from rlhf_cli.models.json_files import read_json
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.peft_folder import ADAPTER_CONFIG
from rlhf_cli.settings.shared import LoraSettings

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_adapter(
    model: nn.Module,
    folder: Path,
    name: str = "default",
    *,
    base: str | None = None,
    revision: str | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter in PEFT's format, for `PeftModel.from_pretrained(model_of_the_same_class, folder)`.

    Args:
        model: a model that carries the adapter.
        folder: created if it does not exist.
        name: of the adapter.
        base: path or hub id of the base model, recorded in the adapter's configuration.
        revision: of a base on the hub, recorded there too.
        state: its weights, whole, if those of the model are sharded; see `adapter_state`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: LoraConfig = backbone(model).peft_config[name]  # type: ignore[index,assignment]
    content = config.to_dict() | {"base_model_name_or_path": base, "revision": revision, "inference_mode": True}
    content["target_modules"] = sorted(content["target_modules"])
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    prefix = _PEFT_PREFIX + _backbone_prefix(model)
    state = adapter_state(model, name) if state is None else state
    tensors = {prefix + key: weight.cpu().contiguous() for key, weight in state.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


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
    base_keys = {key.replace(WRAPPED, "") for key, _ in backbone(model).named_modules()}
    state = {_relative_key(key, base_keys, folder): weight for key, weight in stored.items()}
    keys = {key.rsplit(".", 2)[0].replace(WRAPPED, "") for key in state}
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
    plain = [layer.replace(WRAPPED, "") for layer in layers]
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


def _is_linear(base: nn.Module, key: str) -> bool:
    module = base.get_submodule(key)
    return isinstance(module.get_base_layer() if isinstance(module, LoraLayer) else module, nn.Linear | Conv1D)


def _relative_key(key: str, base_keys: set[str], folder: Path) -> str:
    """Make a key relative to the backbone: `base_model.model.model.layers.0...` -> `layers.0...`."""
    parts = key.split(".")
    for start in range(len(parts) - 2):
        if ".".join(part for part in parts[start:-2] if f".{part}" != WRAPPED) in base_keys:
            return ".".join(parts[start:])
    raise ModelError(
        f"the adapter in {folder} does not fit the model: the model has no layer for `{key}`",
        hint="give the model that the adapter was trained on",
    )
