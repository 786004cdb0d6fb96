"""Why torch does not use the GPU of this machine: a build without CUDA, or a driver that does not fit."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_DEVICES = ("/proc/driver/nvidia/gpus/*", "/dev/nvidia[0-9]*", "/usr/lib/wsl/lib/libcuda.so*")
"""Files of NVIDIA's driver on Linux, and under the Windows subsystem for Linux, that exist only beside a GPU."""


@dataclass(frozen=True)
class UnusedGPU:
    """A GPU that torch cannot use.

    Attributes:
        reason: why.
        fix: what to do about it.
    """

    reason: str
    fix: str


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether this machine has an NVIDIA GPU that CUDA_VISIBLE_DEVICES does not hide, found without torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        return False
    if any(next(root.glob(pattern.lstrip("/")), None) for pattern in _DEVICES):
        return True
    return shutil.which("nvidia-smi") is not None  # comes with the driver


def unused_gpu() -> UnusedGPU | None:
    """Return why torch does not use this machine's GPU; None if it does, or if there is none."""
    if torch.cuda.is_available() or not has_nvidia_gpu():
        return None
    if torch.version.cuda is None:
        return UnusedGPU(
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} is built without CUDA", _install_command()
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # what `is_available` hides
        reason = str(error).strip().partition("\n")[0]
    else:
        reason = "torch.cuda.is_available() is false"
    return UnusedGPU(
        f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it: {reason}",
        f"update the NVIDIA driver to one that supports CUDA {torch.version.cuda} (`nvidia-smi` shows what it "
        "supports), or install a torch that is built for an older CUDA",
    )


def _install_command() -> str:
    version = torch.__version__.partition("+")[0]
    if sys.platform == "linux":  # on the package index, torch for Linux is built with CUDA
        command = (
            f"`{sys.executable} -m pip install --force-reinstall --index-url https://pypi.org/simple torch=={version}`"
        )
    else:
        command = f"torch {version} with the command that https://pytorch.org/get-started/locally shows for CUDA"
    return f"install {command}"
