"""Keeps libraries quiet about their own affairs. Set before any of them is imported; what a user set stays."""

from __future__ import annotations

import os
import warnings

_DEFAULTS = {
    "PYDANTIC_DISABLE_PLUGINS": "__all__",  # looking for them reads every installed package's metadata
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # it warns after a fork otherwise
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
_LIBRARIES = r"(torch|transformers|trl|peft|accelerate|datasets|huggingface_hub|tokenizers)(\.|$)"


def debugging() -> bool:
    """Whether `RLHF_DEBUG` asks for tracebacks and for what libraries have to say."""
    return os.environ.get("RLHF_DEBUG", "") not in ("", "0")


def prepare() -> None:
    """Set the defaults and filter the warnings of libraries; ours and a user's own code's still show."""
    if debugging():
        return
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    warnings.filterwarnings("ignore", category=FutureWarning)  # often attributed to the caller, which is us
