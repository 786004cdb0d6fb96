"""Step checkpoints inside a stage: atomic, checked by SHA-256, and passed over, loudly, when damaged.

A checkpoint is a folder `step-00000010/` with `tensors.safetensors`, `state.json` and `SHA256SUMS`, written as a
temporary folder, fsynced, and renamed into place. safetensors carries no checksum of its own, so a flipped bit would
otherwise pass unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_cli.errors import DiskError
from rlhf_cli.progress import warn

_SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose sums are right.

    Attributes:
        step: steps that were done when it was written.
        tensors: name -> tensor on the CPU.
        state: what JSON can hold.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int = 2
) -> None:
    """Write the checkpoint of `step` and remove all but the newest `keep`.

    Raises:
        DiskError: the disk is full; the checkpoint before is untouched.
    """
    temporary = folder / f".step-{step:08d}.partial"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # Two names of one storage (tied weights) are refused by safetensors, so every tensor is written for itself.
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
                  temporary / "tensors.safetensors")  # fmt: skip
        (temporary / "state.json").write_text(json.dumps(state, sort_keys=True), encoding="utf-8")
        sums = "".join(f"{_digest(path)}  {path.name}\n" for path in sorted(temporary.iterdir()))
        (temporary / _SUMS).write_text(sums, encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _fsync(path)
        target = folder / f"step-{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _fsync(folder)
    except OSError as error:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise DiskError(
            f"cannot write the checkpoint of step {step} in {folder}: {error.strerror or error}; "
            f"it needs {needed:,} bytes",
            hint="free some space and run the same command again; the checkpoint before is intact",
        ) from error
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None; damaged ones are named in a warning and passed over."""
    for path in _folders(folder):
        problem = _problem(path)
        if problem is None:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            return Checkpoint(int(path.name.removeprefix("step-")), load_file(path / "tensors.safetensors"), state)
        warn(f"passing over the checkpoint {path}: {problem}")
    return None


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _problem(path: Path) -> str | None:
    try:
        lines = (path / _SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return f"its {_SUMS} cannot be read ({error})"
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if set(expected) != {"tensors.safetensors", "state.json"}:
        return f"its {_SUMS} is damaged"
    for name, digest in expected.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != digest:
            return f"{name} does not match its checksum"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rng_tensors() -> dict[str, Tensor]:
    """State of torch's generators, for a checkpoint."""
    states = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"rng/cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_rng(tensors: dict[str, Tensor]) -> None:
    """Put torch's generators back to where a checkpoint left them."""
    torch.set_rng_state(tensors["rng/cpu"])
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        torch.cuda.set_rng_state_all([tensors[f"rng/cuda{index}"] for index in range(count)])


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Per-parameter state of an optimiser (AdamW's moments and step counts), by parameter number."""
    return {
        f"{prefix}/{number}/{name}": value
        for number, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """Inverse of `optimizer_tensors`; the groups' settings stay those the optimiser was made with."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix + "/"):
            number, name = key.removeprefix(prefix + "/").split("/")
            state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
