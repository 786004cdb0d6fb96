"""The adapter of a policy, kept beside the weights into which it is merged.

A folder that a stage writes after training an adapter has the merged weights in float32, `adapter/` in PEFT's format,
and `adapter/base.json`, which says what the adapter was trained on. If that base was such a folder too, its adapter is
copied to `adapter/base_adapter/`, and so on.

Where products are in bfloat16, the merged weights alone would lose most of a small update (docs/decisions/0010). They
are then split again at loading: the merged weights minus B A, rounded, are exactly the frozen weights of training.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter_files import read_adapter, save_adapter
from rlhf_cli.models.adapter_layers import backbone
from rlhf_cli.models.lora import cast_weights
from rlhf_cli.models.low_rank import separate
from rlhf_cli.models.peft_folder import BASE_FILE

ADAPTER_FOLDER = "adapter"
_BASE_ADAPTER = "base_adapter"


@dataclass(frozen=True)
class AdapterBase:
    """The content of `adapter/base.json`.

    Attributes:
        path: the model that the adapter was trained on: relative to the policy's folder, or as it was given; None for a
            model that `model.build` made.
        revision: hub revision of that model.
        sha256: of its weight files, see `base_model.hash_weights`; None for a model on the hub.
        dtype: of its frozen weights in training.
        quantize: how they were quantized in training.
    """

    path: str | None
    revision: str | None
    sha256: str | None
    dtype: str
    quantize: str


def save_policy_adapter(
    model: nn.Module,
    folder: Path,
    name: str,
    base: AdapterBase,
    *,
    base_folder: Path,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter `name` of a model to `folder/adapter`.

    Args:
        model: carries the adapter.
        folder: of the policy.
        name: of the adapter in the model.
        base: what it was trained on.
        base_folder: folder of the base; need not exist.
        state: see `save_adapter`.
    """
    target = folder / ADAPTER_FOLDER
    save_adapter(model, target, name, base=base.path, revision=base.revision, state=state)
    text = json.dumps(asdict(base), indent=2, ensure_ascii=False)
    (target / BASE_FILE).write_text(text + "\n", encoding="utf-8")
    if has_policy_adapter(base_folder):
        shutil.copytree(base_folder / ADAPTER_FOLDER, target / _BASE_ADAPTER)


def has_policy_adapter(folder: Path) -> bool:
    """Whether a model folder has the adapter that is merged into its weights."""
    return (folder / ADAPTER_FOLDER / BASE_FILE).is_file()


def separate_adapters(model: nn.Module, folder: Path) -> None:
    """Split merged weights, as `folder` has them, into the frozen weights and the adapters of training, in place.

    Args and errors are those of `split_off_adapters`; weights get the dtype of the frozen ones of training.
    """
    cast_weights(model, split_off_adapters(model, folder))


def split_off_adapters(model: nn.Module, folder: Path) -> torch.dtype:
    """Take the adapters of training out of merged float32 weights, and return the dtype of the frozen ones of training.

    Args:
        model: loaded from `folder` in float32, with any head.
        folder: of a policy with its adapter.

    Raises:
        ModelError: the adapter is damaged or does not fit the weights.
    """
    position = folder / ADAPTER_FOLDER
    try:
        dtype = getattr(torch, json.loads((position / BASE_FILE).read_text(encoding="utf-8"))["dtype"])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{position / BASE_FILE} is damaged: {error}", hint="run the stage that wrote it again"
        ) from error
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    while position.is_dir():
        lora, state = read_adapter(model, position)
        # Fused experts stay merged: in training too, their sum W + B A is what is rounded, in every forward pass.
        for key in (key for key in lora.target_modules if f"{key}.lora_A.weight" in state):
            a, b = (state[f"{key}.lora_{factor}.weight"].float() for factor in "AB")
            factors.setdefault(key, []).append((a, b * (lora.alpha / lora.rank)))
        position = position / _BASE_ADAPTER
    for key, pairs in factors.items():
        layer = backbone(model).get_submodule(key)
        separate(layer, torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1))  # type: ignore[arg-type]
    return dtype


def relative_base(path: str, final: Path, *, depth: int = 1) -> str:
    """Name a base in the same run directory by a relative path, so that the run can be moved; others unchanged.

    Args:
        path: folder or hub id of the base.
        final: folder of the model that names it.
        depth: of that folder below the run directory: 1 for `sft`, 2 for `ppo/critic`.
    """
    base = Path(path)
    if not base.is_dir():
        return path
    base, final = base.resolve(), final.resolve()
    return os.path.relpath(base, final) if final.parents[depth - 1] in base.parents else str(base)
