"""Trained adapters into the weights they were trained on, read again from disk.

The model that trained may hold its frozen weights in bfloat16, or in 4 bits: the sum is taken in float32 with the
weights as they are on disk, and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.lora import add_lora, load_adapter_state, merge_lora


def merged_policy(
    source: ModelSource, state: Mapping[str, Tensor], *, rank: int, alpha: float, target_modules: str | list[str]
) -> PreTrainedModel:
    """The language model at `source` with an adapter merged into it, in float32, on the CPU: where what trained fits a
    GPU by its frozen weights' few bits, this would not fit beside it.

    Args:
        source: the base.
        state: the adapter's weights, by keys of `adapter_state`.
        rank, alpha, target_modules: of the adapter.

    Raises:
        ModelError: the adapter does not fit the base.
    """
    # It computes nothing, so it needs no attention that runs here.
    model = load_policy(replace(source.in_full(), device=torch.device("cpu"), attention="eager"))
    add_lora(model, rank=rank, alpha=alpha, target_modules=target_modules)
    load_adapter_state(model, dict(state))
    merge_lora(model)
    return model
