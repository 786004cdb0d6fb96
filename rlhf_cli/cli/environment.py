"""Silence messages of libraries. Runs before any of them is imported; variables set by the user are kept."""

from __future__ import annotations

import os
import warnings

_DEFAULTS = {
    "PYDANTIC_DISABLE_PLUGINS": "__all__",  # plugin discovery reads the metadata of every installed package
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # otherwise it warns after a fork
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
_LIBRARIES = r"(torch|transformers|trl|peft|accelerate|datasets|huggingface_hub|tokenizers)(\.|$)"


def debugging() -> bool:
    """Return whether `RLHF_DEBUG` enables tracebacks and messages of libraries."""
    return os.environ.get("RLHF_DEBUG", "") not in ("", "0")


def prepare() -> None:
    """Set the defaults and hide warnings of libraries. Warnings of rlhf and of the user's code are still shown."""
    if debugging():
        return
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    warnings.filterwarnings("ignore", category=FutureWarning)  # often attributed to the caller, which is rlhf
