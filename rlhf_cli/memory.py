"""Give memory back before the next model is loaded, and recognize where there is none left."""

from __future__ import annotations

import gc
import sys


def free_memory() -> None:
    """Free models that nothing refers to any more, on the CPU and in CUDA's cache. Imports no torch."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch's allocator of the CPU, or that of a GPU got no memory."""
    # torch.OutOfMemoryError is recognized by its name, since torch may not be imported; on the CPU torch raises a
    # RuntimeError that only its text tells.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
