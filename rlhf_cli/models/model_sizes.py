"""Sizes of models that are not at hand, for `rlhf plan`: of known names, or of a config.json. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_cli.errors import UsageError
from rlhf_cli.models.config_sizes import read_sizes
from rlhf_cli.models.model_shape import BFLOAT16, ModelShape

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def gated_decoder(sizes: Mapping[str, int], *, is_tied: bool) -> ModelShape:
    """Return the shape of a gated decoder (Llama) without biases, stored in bfloat16.

    Args:
        sizes: see `read_sizes`.
        is_tied: whether its embedding is the projection to the vocabulary too.
    """
    hidden, layers = sizes["hidden"], sizes["layers"]
    embeddings = sizes["vocabulary"] * hidden * (1 if is_tied else 2)
    block = hidden * (2 * sizes["queries"] + 2 * sizes["keys"] + 3 * sizes["feed_forward"] + 2)  # and two norms
    weights = embeddings + layers * block + hidden
    return ModelShape(weights, **sizes, embeddings=embeddings, stored=BFLOAT16 * weights)


_KNOWN = {
    # layers, hidden, feed_forward, queries, keys, vocabulary, heads, key_heads, and whether the embedding is tied
    "1b": (16, 2_048, 8_192, 2_048, 512, 128_256, 32, 8, True),  # Llama 3.2 1B
    "8b": (32, 4_096, 14_336, 4_096, 1_024, 128_256, 32, 8, False),  # Llama 3.1 8B
    "32b": (64, 5_120, 25_600, 8_192, 1_024, 151_936, 64, 8, False),  # Qwen3 32B
    "70b": (80, 8_192, 28_672, 8_192, 1_024, 128_256, 64, 8, False),  # Llama 3.1 70B
}
_NAMES = ("layers", "hidden", "feed_forward", "queries", "keys", "vocabulary", "heads", "key_heads")
SIZES = {
    name: gated_decoder(dict(zip(_NAMES, sizes, strict=True)), is_tied=is_tied)
    for name, (*sizes, is_tied) in _KNOWN.items()
}
"""From the config.json of the models named."""


def find_size(given: str) -> ModelShape:
    """Return the sizes of a name in `SIZES`, or of a config.json, whose model is counted as a gated decoder.

    Raises:
        UsageError: no such name or file, or a file that does not say the sizes, or a mixture of experts.
    """
    if (known := SIZES.get(given.lower())) is not None:
        return known
    hint = f"give one of {', '.join(SIZES)}, or the config.json of a decoder"
    file = Path(given)
    if not file.is_file():
        raise UsageError(f"unknown size `{given}`, which is not a file either", hint=hint)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UsageError(f"{file} is not JSON: {error}", hint=hint) from None
    found = _of_config(config.get("text_config", config)) if isinstance(config, dict) else None
    if found is None:
        raise UsageError(f"{file} does not say how large its model is, or it has experts", hint=hint)
    return found


def _of_config(config: Mapping[str, Any]) -> ModelShape | None:
    sizes = read_sizes(config)
    if sizes is None or not sizes["vocabulary"] or any((config.get(name) or 0) > 1 for name in _EXPERTS):
        return None
    return gated_decoder(sizes, is_tied=bool(config.get("tie_word_embeddings")))
