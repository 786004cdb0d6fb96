"""The folder of one checkpoint: `tensors.safetensors`, `state.json` and `SHA256SUMS`, written whole or not at all.

safetensors files have no checksum, so a flipped bit would go unnoticed. Tensors are written one after another and
hashed while they are written, so that saving needs neither a second copy in memory nor a second read of the disk.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import DiskError
from rlhf_cli.files import fsync, hash_file, replace_folder
from rlhf_cli.models.safetensors_format import PIECE_BYTES, SAFETENSORS_NAMES, bytes_of, header_of

FORMAT = 2
"""Version of the folder's format, in `state.json`; raised when an older rlhf could misread a new checkpoint."""

_SUMS, _TENSORS, _STATE = "SHA256SUMS", "tensors.safetensors", "state.json"
_SUMS_PATTERN = rf"([0-9a-f]{{64}})  {re.escape(_STATE)}\n([0-9a-f]{{64}})  {re.escape(_TENSORS)}\n"
_OVERHEAD = 1 << 20
"""Upper bound on the bytes that names, checksums and the file system's own tables take."""


_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}

Take = Callable[[str], Tensor]
"""Returns a whole tensor by its name."""


class DamagedCheckpoint(Exception):  # noqa: N818  (internal: the reader turns it into a warning)
    """A checkpoint differs from what was written; the message names the file and the damage."""


def write_folder(
    target: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], take: Take | None = None
) -> None:
    """Write a checkpoint beside `target`, make it durable, and rename it to `target`.

    A process that dies on the way leaves either the previous folder of that name or the new one.

    Args:
        target: folder to create or replace.
        step: steps done.
        tensors: name -> tensor on any device. Tensors that share memory (tied weights) are written separately.
        state: anything JSON can express.
        take: returns a tensor by its name, whole, and is called in the order of `order_of`; None if all are whole.

    Raises:
        DiskError: there is not enough space, or the disk cannot be written; states the bytes needed, and leaves no
            partial folder.
    """
    plain = json.dumps({"format": FORMAT, "step": step, "state": state}, sort_keys=True).encode()
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + len(plain)
    temporary = partial_folder(target)
    try:
        temporary.mkdir(parents=True)
        _check_space(target, step, needed)
        sums = {
            _TENSORS: _write(temporary / _TENSORS, _serialized(tensors, take or tensors.__getitem__)),
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
        # The rest of a failed attempt would take the space that the next attempt needs.
        shutil.rmtree(temporary, ignore_errors=True)


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, on the CPU.

    Each is mapped into memory when it is asked for, so that only the parts that are used are read, and given back with
    the last reference to it. A copy outlives the file, which rotation removes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
        header.pop("__metadata__", None)
        self._header, self._start = header, 8 + size

    def __getitem__(self, name: str) -> Tensor:
        """Map a tensor."""
        found = self._header[name]
        dtype, (start, end) = _DTYPES[found["dtype"]], found["data_offsets"]
        if start == end:
            return torch.empty(found["shape"], dtype=dtype)
        # Private, since torch warns of tensors in memory that it must not write to.
        mapped = np.memmap(self._path, np.uint8, "c", offset=self._start + start, shape=(end - start,))
        return torch.from_numpy(mapped).view(dtype).reshape(found["shape"])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._header)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._header)


def read_folder(path: Path) -> tuple[int, StoredTensors, dict[str, Any]]:
    """Return step, tensors (on the CPU) and state of a checkpoint, after checking every byte against its checksums.

    Raises:
        DamagedCheckpoint: a byte differs, or another version of rlhf wrote the checkpoint.
    """
    _check_sums(path)
    envelope = json.loads((path / _STATE).read_bytes())
    if envelope.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{_STATE} has format {envelope.get('format')}; this version of rlhf reads {FORMAT}")
    if int(path.name.rpartition("-")[2]) != envelope["step"]:
        raise DamagedCheckpoint(f"{_STATE} is of step {envelope['step']}")
    return envelope["step"], StoredTensors(path / _TENSORS), envelope["state"]


def is_of_another_format(path: Path) -> bool:
    """Whether a checkpoint states a newer format than this version of rlhf reads."""
    try:
        found = json.loads((path / _STATE).read_bytes())
        return isinstance(found["format"], int) and found["format"] > FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def partial_folder(target: Path) -> Path:
    """Return the folder of a checkpoint while it is written."""
    return target.with_name(f".{target.name}.partial")


def replaced_folder(target: Path) -> Path:
    """Return the folder of a replaced checkpoint until its successor has its name."""
    return target.with_name(f".{target.name}.old")


def _check_space(target: Path, step: int, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed + _OVERHEAD:
        raise DiskError(
            f"not enough space for the checkpoint of step {step}: it needs {needed + _OVERHEAD:,} bytes, and the disk "
            f"of {target.parent} has {free:,} free",
            hint="free some space and run the same command again; the checkpoint before is intact",
        )


def _serialized(tensors: dict[str, Tensor], take: Take) -> Iterator[bytes | memoryview]:
    """Yield the pieces of a safetensors file: header length and header, and each tensor's bytes."""
    head, starts = header_of(tensors)
    yield head
    for name in starts:
        yield bytes_of(take(name))


def _write(path: Path, parts: Iterator[bytes | memoryview] | list[bytes]) -> str:
    """Write a file durably; returns its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            beat()
            for start in range(0, len(part), PIECE_BYTES):
                piece = part[start : start + PIECE_BYTES]
                file.write(piece)
                digest.update(piece)
        fsync(file)
    return digest.hexdigest()


def _check_sums(path: Path) -> None:
    try:
        text = (path / _SUMS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{_SUMS} cannot be read ({_reason(error)})") from error
    found = re.fullmatch(_SUMS_PATTERN, text)
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
