"""Give memory back before the next model is loaded, and recognize where there is none left."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Mapping
from pathlib import Path


def keep_freed_memory() -> None:
    """Let glibc keep what a pass frees for the next one, until `trim_memory`.

    Activations and gradients are allocated and freed again and again. By default glibc returns blocks of 32 MiB and
    more to the system each time, and every page of the next block is a fault: in full fine-tuning of a small model on a
    CPU a fifth of the time. The process keeps the most that it ever held in blocks of less than 1 GiB: where that is
    much and not used again, `trim_memory` gives it back. What a user set in the environment stays.
    """
    _set_glibc({_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1})  # the largest number that it takes


def return_freed_memory() -> None:
    """Let glibc return each block of 128 KiB and more to the system when it is freed.

    A sharded model gathers blocks of weights all the time, also in threads of gloo, each with a heap of its own. By
    default, what these keep took several times the memory of the weights. What a user set in the environment stays.
    """
    _set_glibc({_MMAP_THRESHOLD: 1 << 17})


def _set_glibc(parameters: Mapping[int, int]) -> None:
    chosen = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if sys.platform != "linux" or chosen or (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is None:
        return
    for parameter, value in parameters.items():
        mallopt(parameter, value)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""


def trim_memory() -> None:
    """Return to the system what glibc keeps of freed blocks, which count as memory of the process."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def free_memory() -> None:
    """Free models that nothing refers to any more, on the CPU and in CUDA's cache. Imports no torch."""
    gc.collect()
    trim_memory()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch's allocator of the CPU, or a GPU got no memory."""
    # torch.OutOfMemoryError is recognized by its name, since torch may not be imported; on the CPU torch raises a
    # RuntimeError that only its text tells.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY))
    )


_OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
"""In messages of torch's allocator of the CPU, of cuBLAS, and of a kernel's launch."""


def machine_memory(device: str = "cpu") -> int:
    """Return the memory of a device of this machine in bytes: of the first GPU, or what this process may use.

    A container may allow less than the machine has.

    Args:
        device: "cpu", or the type of another device of torch.
    """
    torch = sys.modules.get("torch")
    if device == "cuda" and torch is not None:
        return torch.cuda.get_device_properties(0).total_memory
    import psutil  # a dependency of accelerate

    allowed = [psutil.virtual_memory().total]
    for file in _LIMITS:
        try:
            allowed.append(int(file.read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(allowed)


_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files of Linux with the limit of this process's group, in bytes."""
