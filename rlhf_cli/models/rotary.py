"""Rotary frequencies that do not depend on what else is in a batch.

With rope type `dynamic` or `longrope`, transformers chooses the frequencies of a whole forward pass by its longest
position: a text next to a longer one gets other hidden states, and a completion is drawn with other frequencies than it
is scored with. Here a model keeps the frequencies of texts up to its original length, with which it was pretrained, and
reads no longer ones. On those texts it computes what transformers computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_cli.models.backbone import text_config
from rlhf_cli.progress import say_once

_FIXED = "default"


def pin_rotary_frequencies(model: PreTrainedModel, name: str) -> None:
    """Stop the modules of a model from choosing their frequencies by length, in place; says so if texts get shorter.

    Args:
        model: as loaded, before its first forward pass.
        name: of the model, for messages.
    """
    modules = [module for module in model.modules() if _pin(module)]
    config = text_config(model.config)
    longest, allowed = switching_length(config), getattr(config, "max_position_embeddings", 0)
    if modules and longest is not None and longest < allowed:
        say_once(
            f"`{name}` reads at most {longest:,} tokens here, not {allowed:,}: beyond that, its rotary frequencies "
            "depend on the longest text of a batch, and so would the results"
        )


def switching_length(config: PretrainedConfig) -> int | None:
    """Return the number of tokens beyond which transformers switches the frequencies; None if it never does.

    Args:
        config: of a text model.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [value for value in parameters.values() if isinstance(value, Mapping)] or [parameters]
    lengths = [_length(one, config) for one in each if _switches(one.get("rope_type"))]
    return min(lengths, default=None)


def _length(parameters: Mapping[str, Any], config: PretrainedConfig) -> int:
    # `dynamic` switches at the length of the configuration, `longrope` at one of its own.
    own = parameters.get("original_max_position_embeddings") if parameters.get("rope_type") == "longrope" else None
    return int(own or config.max_position_embeddings)


def _switches(rope_type: object) -> bool:
    return isinstance(rope_type, str) and ("dynamic" in rope_type or rope_type == "longrope")


def _pin(module: nn.Module) -> bool:
    """Whether a module chose its frequencies by length; it no longer does: `rope_type` is what its forward asks."""
    types: Any = getattr(module, "rope_type", None)
    if isinstance(types, dict) and any(map(_switches, types.values())):
        module.rope_type = {layer: _FIXED if _switches(kind) else kind for layer, kind in types.items()}  # pyright: ignore
        return True
    if _switches(types):
        module.rope_type = _FIXED  # pyright: ignore[reportArgumentType]
        return True
    return False
