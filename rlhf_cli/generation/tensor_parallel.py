"""Which models can be divided among the GPUs of a vLLM engine (`generation.tensor_parallel_size`). Imports no torch.

The rules are those of vLLM's layers: every GPU has as many heads and columns as any other, and has whole heads. Where
there are fewer key heads than GPUs, several GPUs have the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def indivisible(config: Mapping[str, Any], size: int) -> str | None:
    """Return why vLLM does not divide a model among `size` GPUs, as a clause; None if it does, as far as is known.

    Args:
        config: of the model, as config.json has it.
        size: GPUs of an engine.
    """
    sizes = config.get("text_config") or config

    def first(*names: str) -> int:
        return next((int(sizes[name]) for name in names if isinstance(sizes.get(name), int)), 0)

    heads = first("num_attention_heads", "num_heads", "n_head")
    keys = first("num_key_value_heads") or heads
    if heads % size:
        return f"its {heads} attention heads cannot be divided among {size} GPUs"
    if max(keys, size) % max(1, min(keys, size)):
        return f"its {keys} key-value heads cannot be divided among {size} GPUs"
    if (inner := first("intermediate_size", "n_inner")) % size:
        return f"its feed-forward size of {inner} cannot be divided among {size} GPUs"
    return None
