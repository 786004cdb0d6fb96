"""A checkpoint's folder: `tensors.safetensors`, `state.json` and `SHA256SUMS`, written whole or not at all.

safetensors carries no checksum of its own, so a flipped bit would otherwise pass unseen. Tensors are written one after
another and hashed on their way, so that saving needs no second copy of them in memory and no second look at the disk.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import DiskError
from rlhf_cli.files import fsync, hash_file, replace_folder

FORMAT = 1
"""Of the folder and of the envelope in `state.json`; raised when an older rlhf could misread a new one."""

_SUMS, _TENSORS, _STATE = "SHA256SUMS", "tensors.safetensors", "state.json"
_SUMS_FORM = rf"([0-9a-f]{{64}})  {re.escape(_STATE)}\n([0-9a-f]{{64}})  {re.escape(_TENSORS)}\n"
_PIECE = 4 << 20
"""Bytes written and hashed at once: small enough to be in the processor's cache for both."""
_BESIDE = 1 << 20
"""Bytes that file names, sums and the file system's own tables take, at most."""
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class DamagedCheckpoint(Exception):  # noqa: N818  (internal: whoever reads turns it into a warning)
    """A checkpoint that is not what was written; the message names the file and says what is wrong with it."""


def write_folder(target: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint beside `target`, make it durable, and give it that name.

    A process that dies on the way leaves the folder that had the name before, or the new one.

    Args:
        target: the folder to be.
        step: steps done.
        tensors: name -> tensor on any device. Tensors that share memory (tied weights) are written each for itself.
        state: what JSON can hold.

    Raises:
        DiskError: there is no room, or the disk cannot be written; says the bytes needed, and leaves no half folder.
    """
    plain = json.dumps({"format": FORMAT, "step": step, "state": state}, sort_keys=True).encode()
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + len(plain)
    temporary = partial_folder(target)
    try:
        temporary.mkdir(parents=True)
        _check_room(target, step, needed)
        sums = {
            _TENSORS: _write(temporary / _TENSORS, _serialized(tensors)),
            _STATE: _write(temporary / _STATE, [plain]),
        }
        _write(temporary / _SUMS, ["".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()])
        fsync(temporary)
        replace_folder(temporary, target, old=replaced_folder(target))
    except OSError as error:
        raise DiskError(
            f"cannot write the checkpoint of step {step} in {target.parent}: {(error.strerror or str(error)).lower()}; "
            f"it needs {needed:,} bytes",
            hint="free some space and run the same command again; the checkpoint before is intact",
        ) from error
    finally:
        # What is left of a failed attempt would take the room that the next one needs.
        shutil.rmtree(temporary, ignore_errors=True)


def read_folder(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """Step, tensors (on the CPU) and state of a checkpoint whose every byte is as it was written.

    Raises:
        DamagedCheckpoint: it is not, or a newer rlhf wrote it.
    """
    _check_sums(path)
    envelope = json.loads((path / _STATE).read_bytes())
    if envelope.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{_STATE} has format {envelope.get('format')}; this rlhf knows {FORMAT}")
    if int(path.name.rpartition("-")[2]) != envelope["step"]:
        raise DamagedCheckpoint(f"{_STATE} is of step {envelope['step']}")
    return envelope["step"], load_file(path / _TENSORS), envelope["state"]


def is_of_another_format(path: Path) -> bool:
    """Whether a checkpoint says that it was written by an rlhf with another format than this one."""
    try:
        found = json.loads((path / _STATE).read_bytes())
        return isinstance(found["format"], int) and found["format"] > FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def partial_folder(target: Path) -> Path:
    """Where a checkpoint is while it is written."""
    return target.with_name(f".{target.name}.partial")


def replaced_folder(target: Path) -> Path:
    """Where a checkpoint is between the moment it loses its name and the moment its successor has it."""
    return target.with_name(f".{target.name}.old")


def _check_room(target: Path, step: int, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed + _BESIDE:
        raise DiskError(
            f"no room for the checkpoint of step {step}: it needs {needed + _BESIDE:,} bytes, and the disk of "
            f"{target.parent} has {free:,} free",
            hint="free some space and run the same command again; the checkpoint before is intact",
        )


def _serialized(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The pieces of a safetensors file: header length, header, and each tensor's bytes."""
    # Wide types first, as safetensors does it, so that every tensor lies on a multiple of its own element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, parts: Iterator[bytes | memoryview] | list[bytes]) -> str:
    """Write a file durably; returns its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            beat()
            for start in range(0, len(part), _PIECE):
                piece = part[start : start + _PIECE]
                file.write(piece)
                digest.update(piece)
        fsync(file)
    return digest.hexdigest()


def _check_sums(path: Path) -> None:
    try:
        text = (path / _SUMS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{_SUMS} cannot be read ({_reason(error)})") from error
    found = re.fullmatch(_SUMS_FORM, text)
    if found is None:
        raise DamagedCheckpoint(f"{_SUMS} is damaged")
    for name, expected in zip((_STATE, _TENSORS), found.groups(), strict=True):
        try:
            digest = hash_file(path / name)
        except OSError as error:
            raise DamagedCheckpoint(f"{name} cannot be read ({_reason(error)})") from error
        if digest != expected:
            raise DamagedCheckpoint(f"{name} does not match its checksum")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
