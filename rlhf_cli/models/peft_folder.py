"""Folders that PEFT wrote, taken as models: the base with the adapter merged into it.

Trained policies are compared with such a model as a whole: the reference of PPO is base and adapter, not the base (trap
15 of docs/ppo.md). Merging is PEFT's own, in float32, so that every kind of adapter that can be merged works.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.hub import local_folder
from rlhf_cli.models.stored_weights import ADAPTER, plain_names, read_stored_weights
from rlhf_cli.models.third_party import reading

_CONFIG = "adapter_config.json"
_BASE_FILE = "base.json"  # of a policy's adapter, see `models.policy_adapter`
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
        return self.folder / _CONFIG

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
    if not (folder / _CONFIG).is_file():
        return None
    try:
        config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        kind = str(config["peft_type"])
        recorded = folder / _BASE_FILE
        sha256 = json.loads(recorded.read_text(encoding="utf-8"))["sha256"] if recorded.is_file() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / _CONFIG} is damaged: {error}", hint="save the adapter again with PEFT") from error
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        raise ModelError(
            f"`{path}` holds a whole model and a PEFT adapter, and it is not said whether the adapter is merged",
            hint=f"if the model is to be used as it is, move {_CONFIG} to another folder; else the weights",
        )
    if kind in _PROMPT_LEARNING:
        raise ModelError(
            f"`{path}` is a PEFT adapter of kind {kind}, which cannot be merged into the weights of a model",
            hint="give a model or an adapter of weights, such as LoRA",
        )
    return PeftFolder(folder, _find_base(folder, config), config.get("revision"), sha256)


def _find_base(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the base: a path relative to the adapter or to the working directory, or a hub id.

    Raises:
        ModelError: it is none of these.
    """
    base = config.get("base_model_name_or_path")
    hint = f"set `base_model_name_or_path` in {folder / _CONFIG} to the folder or hub id of the base model"
    if not isinstance(base, str) or not base:
        raise ModelError(f"the PEFT adapter {folder} does not say which model it was trained on", hint=hint)
    # An adapter of ours, in the folder of its policy or reward model, names its base relative to that folder.
    starts = [folder, *([folder.parent] if folder.name == "adapter" else []), Path()]
    places = list(dict.fromkeys((start / base).resolve() for start in starts))
    for place in places:
        if place.is_dir() and place != folder.resolve():
            return str(place)
    if _HUB_ID.fullmatch(base) and not base.startswith("."):
        return base
    raise ModelError(
        f"the PEFT adapter {folder} was trained on `{base}`, which is not there: looked for "
        + " and ".join(map(str, places)),
        hint=hint,
    )


def resize_to(model: PreTrainedModel, adapter: PeftFolder) -> None:
    """Give a base the rows of the embeddings that PEFT stored with the adapter, for tokens that were added."""
    input_embeddings: Any = model.get_input_embeddings()
    embeddings = next((name for name, module in model.named_modules() if module is input_embeddings), "")
    shape = next((shape for name, shape in adapter.shapes.items() if name == f"{embeddings}.weight"), None)
    if shape is not None and shape[0] > len(input_embeddings.weight):
        model.resize_token_embeddings(shape[0], mean_resizing=False)


def merge(model: PreTrainedModel, adapter: PeftFolder) -> PreTrainedModel:
    """Return the base with the adapter merged into its weights.

    Args:
        model: the base in float32, with the head that the adapter was trained with.
        adapter: of the base.

    Raises:
        ModelError: the adapter does not fit the base, or its kind cannot be merged.
    """
    resize_to(model, adapter)
    with _adapting(adapter):
        adapted = PeftModel.from_pretrained(model, str(adapter.folder), torch_device="cpu")
        _check_all_read(adapted, adapter)
        merged = adapted.merge_and_unload()
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    merged.config.dtype = torch.float32
    return merged


def check_fits(empty: PreTrainedModel, adapter: PeftFolder) -> None:
    """Check by names that an adapter fits its base; no weight is read.

    Args:
        empty: the base on the meta device, with the head that the adapter was trained with.
        adapter: of the base.

    Raises:
        ModelError: it does not fit, or its configuration is damaged.
    """
    resize_to(empty, adapter)
    with _adapting(adapter), torch.device("meta"):
        config = PeftConfig.from_pretrained(str(adapter.folder))
        if not isinstance(getattr(config, "init_lora_weights", True), bool):
            config.init_lora_weights = True  # pyright: ignore[reportAttributeAccessIssue]  (others compute with weights)
        _check_all_read(get_peft_model(empty, config), adapter)


@contextmanager
def _adapting(adapter: PeftFolder) -> Iterator[None]:
    """Context in which PEFT reads an adapter and puts it on a model."""
    what = f"the PEFT adapter {adapter.folder} cannot be merged into {adapter.base}"
    hint = f"check `base_model_name_or_path` in its {_CONFIG}, and whether its kind can be merged"
    with warnings.catch_warnings(), reading(what, adapter.folder, (_CONFIG,), hint=hint):
        warnings.simplefilter("ignore")  # missing keys are errors here
        yield


def _check_all_read(adapted: Any, adapter: PeftFolder) -> None:
    """PEFT ignores weights that are missing from a file and weights that do not fit: refuse both."""
    stored = set(read_stored_weights(adapter.folder, ADAPTER))
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    problem = "is missing" if (missing := sorted(expected - stored)) else "is not used"
    # With resized embeddings, PEFT stores those of `modules_to_save` twice.
    twice = {name for name in stored if name.replace(".modules_to_save.", ".") in expected}
    unused = sorted(stored - expected - twice - set(adapted.state_dict()))
    if differing := missing or unused:
        raise ModelError(
            f"the PEFT adapter {adapter.folder} does not fit {adapter.base}: `{differing[0]}` {problem} "
            f"({len(differing):,} such weights)",
            hint="give the base on which it was trained in `base_model_name_or_path` of its adapter_config.json",
        )
