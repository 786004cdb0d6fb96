"""The name of the key-value cache among the arguments and outputs of transformers' models.

It is `cache` since transformers 5.24. Before, it was `past_key_values`, and `cache_params` in state-space models.
Both are supported as long as pyproject.toml allows earlier versions; CONTRIBUTING.md says how both are tested.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from transformers.modeling_outputs import BaseModelOutputWithPast

_OLD_NAMES = ("past_key_values", "cache_params")
_IS_RENAMED = "cache" in BaseModelOutputWithPast.__dataclass_fields__
CACHE = "cache" if _IS_RENAMED else "past_key_values"
"""The name in the installed transformers, for attention models."""

Forward = TypeVar("Forward", bound=Callable[..., Any])


def cache_argument(cache: object) -> dict[str, Any]:
    """Return a cache as a keyword argument of the installed transformers."""
    return {CACHE: cache}


def cache_name(forward: Callable[..., object]) -> str:
    """Return the name under which a model's forward pass takes its cache; code of a model's own may use an old one."""
    accepted = inspect.signature(forward).parameters
    return next((name for name in ("cache", *_OLD_NAMES) if name in accepted), CACHE)


def cache_of(output: Mapping[str, Any]) -> Any:
    """Return the cache in a model's output; None if it has none."""
    # Since it was renamed, outputs translate the old names, and asking for one of these is warned of.
    return next((output[name] for name in ((CACHE,) if _IS_RENAMED else _OLD_NAMES) if name in output), None)


def takes_cache(forward: Forward) -> Forward:
    """Let a forward pass with a parameter `cache` take it as `past_key_values` too, as it was called before."""

    @wraps(forward)
    def taking(*args: Any, **kwargs: Any) -> Any:
        if (cache := kwargs.pop("past_key_values", None)) is not None:
            kwargs["cache"] = cache
        return forward(*args, **kwargs)

    return taking  # pyright: ignore[reportReturnType]
