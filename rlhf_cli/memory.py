"""Give memory back before the next model is loaded."""

from __future__ import annotations

import gc
import sys


def free_memory() -> None:
    """Free models that nothing refers to any more, on the CPU and in CUDA's cache. Imports no torch."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
