"""Folders that PEFT wrote, wherever a model is accepted: what they hold and where their base is. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ModelError
from rlhf_cli.models.hub import local_folder
from rlhf_cli.models.json_files import read_json
from rlhf_cli.models.stored_weights import ADAPTER, plain_names, read_stored_weights

ADAPTER_CONFIG = "adapter_config.json"
BASE_FILE = "base.json"
"""Beside the configuration of a policy's adapter, see `models.policy_adapter`."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PROMPT_LEARNING = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")


@dataclass(frozen=True)
class PeftFolder:
    """An adapter and where its base is.

    Attributes:
        folder: of the adapter.
        base: folder or hub id of the base.
        base_revision: of a base on the hub.
        base_sha256: of the base's weight files, which the stages of rlhf record; None in other folders.
    """

    folder: Path
    base: str
    base_revision: str | None
    base_sha256: str | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored weights by names without wrappers."""
        stored = read_stored_weights(self.folder, ADAPTER)
        names = plain_names(stored)
        return {names[name]: weight.shape for name, weight in stored.items()}

    @property
    def config_file(self) -> Path:
        """The file that names the base."""
        return self.folder / ADAPTER_CONFIG

    @property
    def has_tokenizer(self) -> bool:
        """Whether the adapter's folder has a tokenizer of its own."""
        return any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def find_peft_folder(path: str, revision: str | None = None) -> PeftFolder | None:
    """Return the adapter at a path or hub id; None if there is a whole model.

    Raises:
        ModelError: there is no such model, the adapter cannot be merged, its base is not found, or the folder holds a
            model too.
    """
    folder = local_folder(path, revision, with_weights=False)
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    config, recorded = read_json(folder / ADAPTER_CONFIG), read_json(folder / BASE_FILE)
    for fields, name, field in ((config, ADAPTER_CONFIG, "peft_type"), (recorded, BASE_FILE, "sha256")):
        if field not in fields and (folder / name).is_file():
            raise ModelError(f"{folder / name} is damaged: it has no `{field}`", hint="save the adapter again")
    kind = str(config["peft_type"])
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        raise ModelError(
            f"`{path}` holds a whole model and a PEFT adapter, and nothing says whether the adapter is already merged",
            hint=f"if it is merged, move {ADAPTER_CONFIG} to another folder; if not, move the whole model's weights",
        )
    if kind in _PROMPT_LEARNING:
        raise ModelError(
            f"`{path}` is a PEFT adapter of kind {kind}, which cannot be merged into the weights of a model",
            hint="give a model or an adapter of weights, such as LoRA",
        )
    revision = config.get("revision") or recorded.get("revision")
    return PeftFolder(folder, _find_base(folder, config), revision, recorded.get("sha256"))


def _find_base(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the base: a path relative to the adapter or to the working directory, or a hub id.

    Raises:
        ModelError: it is none of these.
    """
    base = config.get("base_model_name_or_path")
    hint = f"set `base_model_name_or_path` in {folder / ADAPTER_CONFIG} to the folder or hub id of the base model"
    if not isinstance(base, str) or not base:
        raise ModelError(f"the PEFT adapter {folder} does not say which model it was trained on", hint=hint)
    # An adapter of ours, in the folder of its policy or reward model, names its base relative to that folder.
    starts = [folder, *([folder.parent] if folder.name == "adapter" else []), Path()]
    paths = list(dict.fromkeys((start / base).resolve() for start in starts))
    for path in paths:
        if path.is_dir() and path != folder.resolve():
            return str(path)
    if _HUB_ID.fullmatch(base) and not base.startswith("."):
        return base
    raise ModelError(
        f"the PEFT adapter {folder} was trained on `{base}`, which is not there: looked for "
        + " and ".join(map(str, paths)),
        hint=hint,
    )
