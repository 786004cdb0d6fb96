"""The device of a process: `model.device`, resolved for this machine."""

from __future__ import annotations

import os
from functools import cache

import torch

from rlhf_cli.distributed.accelerate_settings import USE_CPU, wants_cpu
from rlhf_cli.distributed.ranks import world_size
from rlhf_cli.errors import ModelError
from rlhf_cli.models.gpu_check import unused_gpu
from rlhf_cli.progress import warn


def resolve_device(name: str) -> torch.device:
    """Resolve `auto` (CUDA if available, else the CPU), `cpu` or `cuda`. Each process of a group gets its own GPU.

    Under `accelerate launch --cpu`, `auto` is the CPU and `cuda` an error. `auto` never selects MPS: sampling uses
    float64, which MPS does not support.

    Raises:
        ModelError: the name is unknown, or the GPU is not available.
    """
    if wants_cpu(os.environ):
        if name == "cuda":
            raise ModelError(
                f"`model.device: cuda`, but accelerate's launcher was told to use the CPU ({USE_CPU})",
                hint=f"use `auto` or `cpu`, or launch without `--cpu` (`use_cpu: false`, {USE_CPU}=false)",
            )
        name = "cpu" if name == "auto" else name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            warn_of_unused_gpu()
    if name == "mps":
        raise ModelError(
            "`model.device: mps` is not supported: sampling uses float64, which Apple's GPUs do not have",
            hint="use `cpu`",
        )
    if name not in ("cpu", "cuda"):
        raise ModelError(
            f"`model.device` must be auto, cpu or cuda, got `{name}`",
            hint="to choose one of several GPUs, set CUDA_VISIBLE_DEVICES=1",
        )
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        unused = unused_gpu()
        if unused is not None:
            raise ModelError(f"`model.device: cuda`: {unused.reason}", hint=f"{unused.fix}; or use `cpu`")
        raise ModelError("`model.device: cuda`: torch finds no CUDA device", hint="use `auto` or `cpu`")
    return torch.device("cuda") if world_size() == 1 else _own_gpu()


@cache
def warn_of_unused_gpu() -> None:
    """Warn once that `auto` is the CPU although there is a GPU."""
    if (unused := unused_gpu()) is not None:
        warn(f"{unused.reason}; the CPU is used, which takes much longer: {unused.fix}")


def _own_gpu() -> torch.device:
    """Return this process's GPU. NCCL does not allow two processes on one GPU."""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ModelError(
            f"process {number + 1} on this machine finds {count:,} GPUs, but each process needs one of its own",
            hint=f"use `--processes {count}`, or `--set model.device=cpu`",
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
