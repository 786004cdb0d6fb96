"""Merge a trained adapter into its base weights, read again from disk.

The trained model may hold its frozen weights in bfloat16 or in 4 bits. The merge adds the adapter to the weights on
disk in float32, so that they are rounded only once, when the result is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.lora import add_lora, load_adapter_state, merge_lora
from rlhf_cli.settings.shared import LoraSettings


def merged_policy(source: ModelSource, state: Mapping[str, Tensor], lora: LoraSettings) -> PreTrainedModel:
    """Load the language model at `source` and merge an adapter into it, in float32.

    The result is on the CPU: a GPU that holds the trained model in 4 bits may not have room for this one.

    Args:
        source: the base model.
        state: the adapter's weights, with the keys of `adapter_state`.
        lora: the settings with which the adapter was made.

    Raises:
        ModelError: the adapter does not fit the base model.
    """
    # Nothing is computed with it, so any attention will do.
    model = load_policy(replace(source.in_full(), device=torch.device("cpu"), attention="eager"))
    add_lora(model, lora)
    load_adapter_state(model, dict(state))
    merge_lora(model)
    return model
