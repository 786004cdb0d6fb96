"""Merge a PEFT adapter into its base.

Trained policies are compared with such a model as a whole: the reference of PPO is base and adapter, not the base (trap
15 of docs/ppo.md). Merging is PEFT's own, in float32, so that every kind of adapter that can be merged works.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.peft_folder import PeftFolder
from rlhf_cli.models.stored_weights import ADAPTER, read_stored_weights
from rlhf_cli.models.third_party import reading


def _resize(model: PreTrainedModel, adapter: PeftFolder) -> None:
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
    _resize(model, adapter)
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
    _resize(empty, adapter)
    with _adapting(adapter), torch.device("meta"):
        config = PeftConfig.from_pretrained(str(adapter.folder))
        if not isinstance(getattr(config, "init_lora_weights", True), bool):
            config.init_lora_weights = True  # pyright: ignore[reportAttributeAccessIssue]  (others compute with weights)
        _check_all_read(get_peft_model(empty, config), adapter)


@contextmanager
def _adapting(adapter: PeftFolder) -> Iterator[None]:
    """Context in which PEFT reads an adapter and puts it on a model."""
    what = f"the PEFT adapter {adapter.folder} cannot be merged into {adapter.base}"
    hint = f"check `base_model_name_or_path` in its {adapter.config_file.name}, and whether its kind can be merged"
    with warnings.catch_warnings(), reading(what, adapter.folder, (adapter.config_file.name,), hint=hint):
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
            hint=f"give the base on which it was trained in `base_model_name_or_path` of {adapter.config_file.name}",
        )
