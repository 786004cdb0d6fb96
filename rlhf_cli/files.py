"""Durable files: hashes, locks, fsync, atomic writes, and renames that survive a power cut."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any

from rlhf_cli.errors import DataError, DiskError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_LOCKED_BYTE = 1 << 30
"""Windows forbids others to read what is locked; this byte is beyond the end of a lock file."""
_LOCK_PAUSE = 0.1
_LARGE = 2**24
"""Bytes from which a file's hash is kept for the process: inputs are hashed by the pipeline and by the stage."""


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    found = path.stat()
    if found.st_size < _LARGE:
        return _hash(path)
    return _hash_large(path.resolve(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@cache
def _hash_large(path: Path, *_state: int) -> str:
    return _hash(path)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


MODEL_CARD = "README.md"
"""It describes a model, and no result depends on it."""


def hash_folder(folder: Path) -> str:
    """sha256 over the names and contents of a folder's files, without hidden ones (`.cache`, `.git`) and the card."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and path.name != MODEL_CARD and not any(part.startswith(".") for part in relative.parts):
            total.update(f"{relative.as_posix()}\0{hash_file(path)}\n".encode())
    return total.hexdigest()


def lock(file: IO[Any], *, shared: bool = False) -> None:
    """Lock an open file until it is closed or the process ends, however it ends.

    Args:
        file: the file.
        shared: let other shared locks be, where the system has such.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: the file system has no locks.
    """
    if sys.platform != "win32":
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return
    position = file.tell()
    file.seek(_LOCKED_BYTE)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(*error.args) from None
    finally:
        file.seek(position)


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Lock a file, created if needed, once no other process has locked it.

    Raises:
        DiskError: it cannot be written, or the file system has no locks.
    """
    with contextlib.ExitStack() as closing:
        try:
            file = closing.enter_context(path.open("a"))
            while not _is_locked(file):
                time.sleep(_LOCK_PAUSE)
        except OSError as error:
            raise DiskError(
                f"cannot lock {path}: {(error.strerror or str(error)).lower()}",
                hint="use a folder that you can write to, on a file system that supports file locks",
            ) from error
        yield


def _is_locked(file: IO[Any]) -> bool:
    try:
        lock(file)
    except BlockingIOError:
        return False
    return True


def fsync(target: IO[Any] | Path) -> None:
    """Return once an open file's content, or a folder's list of entries, is on the disk."""
    if isinstance(target, Path):
        if sys.platform == "win32" and target.is_dir():
            return  # Windows cannot open a folder, and writes its entries by itself
        descriptor = os.open(target, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
        try:
            _fsync(descriptor)
        finally:
            os.close(descriptor)
    else:
        target.flush()
        _fsync(target.fileno())


def _fsync(descriptor: int) -> None:
    os.fsync(descriptor)


def fsync_tree(folder: Path) -> None:
    """`fsync` of a folder and of everything under it."""
    for path in folder.rglob("*"):
        fsync(path)
    fsync(folder)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder durably. A file at `target` is replaced atomically (POSIX rename)."""
    source.replace(target)
    fsync(target.parent)


def link_or_copy(source: str, target: str) -> None:
    """Give a file a second name, or copy it where the file system has no hard links; see `shutil.copytree`."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def replace_folder(new: Path, target: Path, *, old: Path) -> None:
    """Replace the folder `target` by `new`.

    A process that dies meanwhile leaves the old `target`, or `old` without `target`, or the new `target`. The next
    reader renames `old` back if `target` is missing.

    Args:
        new: complete folder, already on the disk (`fsync_tree`).
        target: may exist.
        old: name of the previous `target` during the replacement; removed at the end.
    """
    if target.exists():
        if old.exists():
            shutil.rmtree(old)
        rename(target, old)
    rename(new, target)
    if old.exists():
        shutil.rmtree(old)


def write_whole(path: Path, content: bytes | str | Iterable[str]) -> None:
    """Write a file atomically: if the process dies, the file is complete or unchanged. Text is written as UTF-8.

    Raises:
        OSError: the disk cannot be written; the file is unchanged.
    """
    pieces = [content] if isinstance(content, bytes | str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece.encode() if isinstance(piece, str) else piece)
            fsync(file)
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reading_artifact(path: Path) -> Iterator[None]:
    """Raise `DataError` in place of what a reader raises for content that no stage writes."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error!r}", hint="recreate it with `rlhf run RECIPE`") from error


def append(path: Path, content: bytes) -> None:
    """Append bytes to a file and return once they are on the disk.

    Raises:
        OSError: the disk cannot be written.
    """
    with path.open("ab") as file:
        file.write(content)
        fsync(file)


class WrittenFiles:
    """Which files of a folder a command wrote, so that the next one removes what it does not write again.

    A file counts as written only if its name is in the list and its bytes are those that were written: what a user
    added, copied or changed stays.

    Args:
        path: the list, `{name: sha256}`, in the folder of the files.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):  # a lost or damaged list: nothing is known for certain
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                self._before = {name: digest for name, digest in found.items() if name == Path(name).name}

    def replace(self, names: Iterable[str]) -> list[str]:
        """Remove the files of before that are not among these, note these, and return what was removed.

        Raises:
            OSError: the folder cannot be written.
        """
        written = {name: hash_file(self._path.with_name(name)) for name in names}
        removed = [name for name in sorted(self._before.keys() - written.keys()) if self._is_as_written(name)]
        for name in removed:
            self._path.with_name(name).unlink()
        if written:
            write_whole(self._path, json.dumps(written, indent=2) + "\n")
        elif self._before:
            self._path.unlink()
        return removed

    def _is_as_written(self, name: str) -> bool:
        path = self._path.with_name(name)
        return path.is_file() and not path.is_symlink() and hash_file(path) == self._before[name]
