"""Disk space: checked before a run starts, and reported when it runs out."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_cli.errors import DiskError, StorageError
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.base import Stage

_MARGIN = 64 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNWRITABLE = {errno.EROFS, errno.EIO}


def needed_bytes(recipe: Recipe, stages: Iterable[Stage]) -> int:
    """Return an upper bound of the disk space that stages need, in bytes.

    Weights are written in float32, which is at most twice the size of a base model in half precision. Models on the hub
    and models made by `model.build` count as 0.
    """
    full = 2 * model_bytes(recipe.model.path)
    return _MARGIN + sum(stage.disk_bytes(recipe.section(stage.name), full) for stage in stages)


def model_bytes(path: str | None) -> int:
    """Return the size of the weight files of a local model folder, in bytes; 0 for anything else.

    A PEFT adapter counts with its base, into which it is merged.
    """
    from rlhf_cli.models.peft_folder import find_peft_folder

    if path is None or not Path(path).is_dir():
        return 0
    own = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    return own if (adapter := find_peft_folder(path)) is None else own + model_bytes(adapter.base)


def check_free_space(folder: Path, needed: int) -> None:
    """Raise `DiskError` if the disk of a folder has less free space than needed, in bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"not enough disk space in {folder}: {format_bytes(free)} free, about {format_bytes(needed)} needed",
            hint="free some space, or choose another disk with --run-dir",
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise `DiskError` in place of any library error that a full or failing disk causes."""
    try:
        yield
    except (DiskError, StorageError):  # have a better message already
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None or _is_elsewhere(error, folder):
            raise
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise DiskError(
            f"{reason} while writing under {folder}, with {free:,} bytes free; the last checkpoint is intact",
            hint="free some space and repeat the command, or move the run directory to another disk",
        ) from error


def _reason(error: BaseException | None) -> str | None:
    """Return the disk problem behind an error or one of its causes; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL | _UNWRITABLE:
            return os.strerror(error.errno or 0).lower()
        if "no space left on device" in str(error).lower():  # safetensors and torch report it only in the message
            return os.strerror(errno.ENOSPC).lower()
        error = error.__cause__ or error.__context__
    return None


def _is_elsewhere(error: Exception, folder: Path) -> bool:
    """Whether an error names a file that is not of the run: data or a model that cannot be read."""
    name = error.filename if isinstance(error, OSError) else None
    return isinstance(name, str) and not Path(name).resolve().is_relative_to(folder.resolve())


def format_bytes(count: float) -> str:
    """Return a number of bytes with a unit, such as `1.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
