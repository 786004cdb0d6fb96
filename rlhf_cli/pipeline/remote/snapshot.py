"""The files of a run directory as they were at one moment, for a copy of them that takes longer than a moment.

A run directory that was killed at any moment can be resumed, so what it was at one moment can be resumed too. Files
that were read one after another, while a stage works, may never have existed together.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from rlhf_cli.files import hash_file, link_or_copy
from rlhf_cli.pipeline.manifest import FILE_NAME

_HIDDEN = re.compile(r"\.[a-z-]+\.(work|last|began\.json)")
"""Hidden entries of a run directory that are copied; others are of one process or one machine."""
_PASSING = re.compile(r".*(\.tmp|\.partial|\.old|\.sqlite-\w+)")
"""Names that are there while something is written."""
_GROWING = re.compile(r".*(\.jsonl|\.txt|\.sqlite|\.tfevents\.[^/]*)")
"""Files that are extended in place, those of TensorBoard among them; others are replaced as a whole."""
_SMALL = 16 << 20
"""Bytes up to which a file is kept in memory."""
IN_MEMORY = 256 << 20
"""Bytes of all these files together."""
_TRIES, _PAUSE = 20, 0.05


@dataclass(frozen=True)
class Seen:
    """A file as a listing shows it.

    Attributes:
        inode: which file it is.
        size: in bytes.
        state: changes whenever the content does.
    """

    inode: int
    size: int
    state: tuple[int, ...]


@dataclass(frozen=True)
class Taken:
    """Content of a file: bytes, or a file that keeps them."""

    content: bytes | Path

    @property
    def size(self) -> int:
        """Number of bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def sha256(self) -> str:
        """sha256 of the content."""
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        return hash_file(self.content)


def scan(folder: Path) -> dict[str, Seen] | None:
    """List the files of a run directory by path; None while a finished stage is moved to its place."""
    if any(folder.glob(f".*.output/{FILE_NAME}")):
        return None
    found = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        inside = Path(parent).relative_to(folder)
        at_top = inside == Path()
        above = {one.resolve() for one in (Path(parent), *Path(parent).parents)}  # links may form a circle
        folders[:] = [
            name for name in folders if _is_copied(name, at_top=at_top) and (Path(parent) / name).resolve() not in above
        ]
        for name in names:
            if _is_copied(name, at_top=at_top) and (seen := _seen(Path(parent) / name)) is not None:
                found[(inside / name).as_posix()] = seen
    return found


def _is_copied(name: str, *, at_top: bool) -> bool:
    if _PASSING.fullmatch(name):
        return False
    return not (at_top and name.startswith(".")) or _HIDDEN.fullmatch(name) is not None


def _seen(path: Path) -> Seen | None:
    try:
        found = path.stat()
        state = [found.st_ino, found.st_size, found.st_mtime_ns]
        if path.suffix == ".sqlite":  # whose latest content is in its log
            log = path.with_name(f"{path.name}-wal")
            state += [log.stat().st_size, log.stat().st_mtime_ns] if log.exists() else []
    except FileNotFoundError:  # removed since it was listed
        return None
    return Seen(found.st_ino, found.st_size, tuple(state))


def take(
    folder: Path, links: Path, is_known: Callable[[str, Seen], bool]
) -> tuple[dict[str, Seen], dict[str, Taken]] | None:
    """Return the files of a run directory at one moment, and the content of those that are not known.

    Args:
        folder: run directory.
        links: folder for large files, which keeps them when a stage removes or extends them; emptied first.
        is_known: whether the content of a file is not needed.

    Returns:
        None if the files kept changing; another time may be better.
    """
    for _ in range(_TRIES):
        shutil.rmtree(links, ignore_errors=True)
        seen = scan(folder)
        if seen is not None:
            try:
                taken = _taken(folder, links, {path: one for path, one in seen.items() if not is_known(path, one)})
            except (FileNotFoundError, _ShorterError, sqlite3.OperationalError):  # removed, replaced or locked
                taken = None
            again = scan(folder)
            if taken is not None and again is not None and not has_changed(seen, again):
                return seen, taken
        time.sleep(_PAUSE)
    return None


class _ShorterError(Exception):
    """A file has become shorter since it was listed."""


def _taken(folder: Path, links: Path, files: Mapping[str, Seen]) -> dict[str, Taken]:
    taken, in_memory = {}, 0
    for number, (path, one) in enumerate(files.items()):
        content = _content(folder / path, links / str(number), one, most=min(_SMALL, IN_MEMORY - in_memory))
        in_memory += len(content) if isinstance(content, bytes) else 0
        taken[path] = Taken(content)
    return taken


def _content(path: Path, link: Path, seen: Seen, *, most: int) -> bytes | Path:
    """Return the content of a file: bytes if there are at most `most`, or a file that keeps them."""
    if path.suffix == ".sqlite":  # closing such a file would release the locks that SQLite holds in this process
        uri = f"file:{quote(str(path.absolute()))}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as store, closing(sqlite3.connect(":memory:")) as copy:
            store.backup(copy)
            return copy.serialize()
    # Files that grow, such as metrics, had their first `seen.size` bytes at the moment of the listing.
    if seen.size <= most:
        with path.open("rb") as file:
            content = file.read(seen.size)
        if len(content) < seen.size:
            raise _ShorterError
        return content
    link.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":  # which never grow
        link_or_copy(str(path), str(link))
        return link
    with path.open("rb") as whole, link.open("wb") as start:
        shutil.copyfileobj(whole, start)
        if start.tell() < seen.size:
            raise _ShorterError
        start.truncate(seen.size)
    return link


def has_changed(before: Mapping[str, Seen], after: Mapping[str, Seen]) -> bool:
    """Whether files came, went or were replaced between two listings; a new file can get the inode of a deleted one."""

    def identities(found: Mapping[str, Seen]) -> dict[str, object]:
        return {path: seen.inode if _GROWING.fullmatch(path) else seen.state for path, seen in found.items()}

    return identities(before) != identities(after)
