"""The sizes of a decoder or encoder-decoder that its config.json says. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def read_sizes(config: Mapping[str, Any]) -> dict[str, int] | None:
    """Return sizes by their names in `model_shape.ModelShape`; None where the configuration does not say them.

    Args:
        config: of the language model, without other parts.
    """

    def first(*names: str, default: int = 0) -> int:
        found = (config.get(name) for name in names)
        return next((int(value) for value in found if isinstance(value, int) and value > 0), default)

    hidden, heads = first("hidden_size", "d_model", "n_embd"), first("num_attention_heads", "num_heads", "n_head")
    layers = first("num_hidden_layers", "num_layers", "n_layer")
    if not (hidden and heads and layers):
        return None
    head, key_heads = first("head_dim", "d_kv", default=hidden // heads), first("num_key_value_heads", default=heads)
    return {
        "layers": layers,
        "hidden": hidden,
        "feed_forward": first("intermediate_size", "d_ff", "n_inner", default=4 * hidden),
        "queries": heads * head,
        "keys": key_heads * head,
        "vocabulary": first("vocab_size"),
        "heads": heads,
        "key_heads": key_heads,
    }
