"""Disk space: checked before a run starts, and named in the error when it runs out."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_cli.errors import DiskError
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.base import Stage

_MARGIN = 64 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNWRITABLE = {errno.EROFS, errno.EIO}


def needed_bytes(recipe: Recipe, stages: Iterable[Stage]) -> int:
    """Disk space that these stages need at most, in bytes; no model bytes where the base is on the hub or built.

    Weights are written in float32, at most twice the bytes of a base in half precision.
    """
    full = 2 * model_bytes(recipe.model.path)
    return _MARGIN + sum(stage.disk_bytes(recipe.section(stage.name), full) for stage in stages)


def model_bytes(path: str | None) -> int:
    """Bytes of the weight files of a local model folder; 0 for anything else."""
    if path is None or not Path(path).is_dir():
        return 0
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))


def check_room(folder: Path, needed: int) -> None:
    """Raise `DiskError` where the disk of a folder has less room than needed."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"the disk of {folder} has {in_words(free)} free; this run needs about {in_words(needed)}",
            hint="free some, or work on another disk with --run-dir",
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full or failing disk, however a library reports it, into `DiskError`."""
    try:
        yield
    except DiskError:  # says more than could be said here
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise DiskError(
            f"{reason} while writing under {folder}, with {free:,} bytes free; the last good state is kept",
            hint="free some room and run the same command again, or move the run to another disk",
        ) from error


def _reason(error: BaseException | None) -> str | None:
    """Why the disk is to blame, looked for in an error and in what caused it; None where it is not."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL | _UNWRITABLE:
            return os.strerror(error.errno or 0).lower()
        if "no space left on device" in str(error).lower():  # safetensors and torch carry it as text only
            return os.strerror(errno.ENOSPC).lower()
        error = error.__cause__ or error.__context__
    return None


def in_words(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
