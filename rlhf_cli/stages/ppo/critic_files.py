"""The files of a saved critic.

A critic is saved as a folder with `value_head.safetensors`, `critic.json`, and a PEFT adapter or an `AutoModel` folder
if it has one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter_files import read_adapter
from rlhf_cli.models.base_model import check_base, locate_base
from rlhf_cli.models.loading import ModelSource, load_config
from rlhf_cli.models.stored_weights import read_header
from rlhf_cli.models.verification import check_tensors, read_tensors
from rlhf_cli.models.weight_loading import check_weights, empty_model, open_weights

Head = tuple[Tensor, Tensor]
"""Weight (1, d) and bias (1,) of a value head."""

_HEAD, _CONFIG, _FORMAT = "value_head.safetensors", "critic.json", 1


@dataclass(frozen=True)
class CriticConfig:
    """The content of `critic.json`.

    Attributes:
        kind: "adapter" on a base model, "full" for a whole backbone, or "head" for a head on the policy of its run.
        base: the adapter's base model, as a path relative to the folder or as it was given; else None.
        base_revision: commit of a base model on the hub.
        base_sha256: of the base's weight files, see `base_model.hash_weights`; None if it is on the hub.
    """

    kind: Literal["adapter", "full", "head"]
    base: str | None
    base_revision: str | None
    base_sha256: str | None = None

    def base_path(self, folder: Path) -> str | None:
        """Return the path or hub id of an adapter's base, else None.

        Raises:
            ModelError: the base is a path where no folder is.
        """
        return None if self.base is None else locate_base(self.base, folder / _CONFIG)

    def check_base(self, folder: Path) -> None:
        """Raise `ModelError` if the base's weights are not those on which the adapter was trained."""
        if (base := self.base_path(folder)) is not None:
            check_base(base, self.base_sha256, folder / _CONFIG)


def read_critic_config(folder: Path) -> CriticConfig:
    """Read `critic.json` of a saved critic.

    Raises:
        ModelError: the file is missing, damaged or of a later format.
    """
    try:
        fields: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if fields.pop("format") != _FORMAT:
            raise ModelError(f"{folder / _CONFIG} has a format that this version cannot read", hint="upgrade rlhf-cli")
        return CriticConfig(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{folder} is not a saved critic: {error}", hint="give the critic of an earlier run, runs/NAME/ppo/critic"
        ) from error


def check_saved_critic(folder: Path) -> None:
    """Check the files of a saved critic: its weights by their headers, its head by its shape, and its base.

    Raises:
        ModelError: a file is missing or damaged, does not fit the others, or the base is not that of its training.
    """
    config, source = read_critic_config(folder), ModelSource(str(folder))
    shapes = {name: weight.shape for name, weight in read_header(folder / _HEAD).items()}
    if set(shapes) != {"weight", "bias"} or shapes["weight"][:-1] != (1,) or shapes["bias"] != (1,):
        raise ModelError(
            f"{folder / _HEAD} is not a value head, a weight (1, d) and a bias (1,): it holds {shapes}",
            hint="give the critic of an earlier run, runs/NAME/ppo/critic",
        )
    if config.kind == "head":
        return
    if config.kind == "full":
        own = load_config(source)
        check_weights(AutoModel, source, own, shapes=open_weights(source, own).shapes)
        return
    if (base := config.base_path(folder)) is None:
        raise ModelError(
            f"the critic in {folder} is an adapter, but its {_CONFIG} names no base model",
            hint="set `base` in it to the folder or hub id of the model that it was trained on",
        )
    config.check_base(folder)
    on = replace(source.at(base), revision=config.base_revision)
    read_adapter(empty_model(AutoModel, on, load_config(on)), folder)


def load_value_head(folder: Path) -> Head:
    """Load weight (1, d) and bias (1,) of a saved critic's head.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        state = load_file(folder / _HEAD)
        return state["weight"], state["bias"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot read {folder / _HEAD}: {error}") from error


def save_head(folder: Path, head: nn.Linear, config: CriticConfig) -> None:
    """Write a value head and `critic.json`."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}, folder / _HEAD)
    text = json.dumps({"format": _FORMAT} | asdict(config), indent=2, ensure_ascii=False)
    (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")


def check_head(folder: Path, head: nn.Linear) -> None:
    """Read a saved value head and compare it; raises `ModelError` where it differs."""
    check_tensors(dict(head.state_dict()), read_tensors(folder / _HEAD), folder)
