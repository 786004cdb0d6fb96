"""Uploads what is new in a run directory to its remote copy, so that each index lists files that are there."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from rlhf_cli.errors import DiskError, RunInUseError, StorageError
from rlhf_cli.files import waiting_lock
from rlhf_cli.pipeline.manifest import now
from rlhf_cli.pipeline.remote.index import Index, RemoteFile, read_index, read_record
from rlhf_cli.pipeline.remote.snapshot import Seen, Taken, has_changed, scan, take
from rlhf_cli.run_log import LOG
from rlhf_cli.storage import Moved, Storage

GROWTH = 15.0
"""Seconds after which files that only grow are uploaded again."""
_SHARE = 10
"""They wait at least so many times as long as their last upload took: all of a file that grew is uploaded again."""
FAILURES = (StorageError, DiskError, OSError, sqlite3.Error)
"""What an upload may raise because of the storage or the disk; another attempt may succeed."""

Bar = Callable[[int], AbstractContextManager[Moved]]
"""Shows the progress of a transfer of so many bytes."""


def locked(folder: Path) -> AbstractContextManager[None]:
    """Wait until no other process of this machine reads or writes the copy of a run directory."""
    return waiting_lock(folder / ".remote.lock")


class Uploader:
    """Uploads snapshots of a run directory, each of which replaces the one before.

    Args:
        storage: the copy.
        folder: run directory.
        name: `name` of the recipe.
    """

    def __init__(self, storage: Storage, folder: Path, name: str) -> None:
        self._storage, self._folder, self._name = storage, folder, name
        self._hashed: dict[str, tuple[tuple[int, ...], str]] = {}
        self._uploaded: dict[str, str] = {}
        self._synced: Mapping[str, Seen] = {}
        self._synced_at = self._took = 0.0

    def is_due(self) -> bool:
        """Whether files came, went or were replaced; or, after some time, grew."""
        found = scan(self._folder)
        if found is None:
            return False
        if has_changed(self._synced, found):
            return True
        has_grown = any(one != self._synced[path] for path, one in found.items() if path != LOG)
        return has_grown and time.monotonic() - self._synced_at > max(GROWTH, _SHARE * self._took)

    def upload(self, bar: Bar) -> bool:
        """Upload what is new; False if the files kept changing.

        Raises:
            StorageError: the storage cannot be used; the copy stays what it was.
            RunInUseError: another machine writes to the copy.
        """
        links, began = self._folder / ".remote.links", time.monotonic()
        with locked(self._folder):
            index = self._own_index()
            try:
                found = take(self._folder, links, lambda *file: self._is_there(index, *file))
                if found is None:
                    return False
                seen, taken = found
                files = self._files(index, seen, taken)
                if (files != index.files or index.garbage) and not self._replace(index, files, taken, bar):
                    return False
            finally:
                shutil.rmtree(links, ignore_errors=True)
            only_grew = not has_changed(self._synced, seen)  # a checkpoint that takes long does not delay labels
            self._synced, self._synced_at = seen, time.monotonic()
            if only_grew:
                self._took = self._synced_at - began
            self._uploaded.clear()
            return True

    def _replace(self, index: Index, files: dict[str, RemoteFile], taken: Mapping[str, Taken], bar: Bar) -> bool:
        """Upload the files that the index lacks and let it list them; False if someone removed it meanwhile."""
        before = {file["key"] for file in index.files.values()}
        lacking = {path: file for path, file in files.items() if file["key"] not in before}
        to_upload = {path: file for path, file in lacking.items() if not self._is_uploaded(index, file)}
        index = replace(index, garbage=sorted({*index.garbage, *(file["key"] for file in lacking.values())}))
        index.write(self._storage)
        with bar(sum(file["bytes"] for file in to_upload.values())) as moved:
            for path, file in to_upload.items():
                self._uploaded.pop(file["key"], None)
                self._storage.upload(taken[path].content, file["key"], moved)
                self._uploaded[file["key"]] = file["sha256"]
        if self._own_index() != index:
            return False
        garbage = sorted({*index.garbage, *before} - {file["key"] for file in files.values()})
        index = replace(index, files=files, garbage=garbage, written=now())
        index.write(self._storage)
        if garbage:
            self._storage.delete(garbage)
            replace(index, garbage=[]).write(self._storage)
        return True

    def _is_uploaded(self, index: Index, file: RemoteFile) -> bool:
        """Whether an earlier attempt, which failed later, has uploaded a file."""
        return file["key"] in index.garbage and self._uploaded.get(file["key"]) == file["sha256"]

    def _is_there(self, index: Index, path: str, seen: Seen) -> bool:
        state, digest = self._hashed.get(path, (None, None))
        return state == seen.state and path in index.files and index.files[path]["sha256"] == digest

    def _files(self, index: Index, seen: Mapping[str, Seen], taken: Mapping[str, Taken]) -> dict[str, RemoteFile]:
        """Return the files of the next index; those whose content is there already keep their key."""
        keys = {file["key"] for file in index.files.values()}
        by_content = {file["sha256"]: file for file in index.files.values()}
        files: dict[str, RemoteFile] = {}
        for path, one in seen.items():
            if path not in taken:
                files[path] = index.files[path]
                continue
            digest, size = taken[path].sha256(), taken[path].size
            self._hashed[path] = (one.state, digest)
            earlier = index.files.get(path)
            if (earlier is None or earlier["sha256"] != digest) and path.startswith("."):
                earlier = by_content.get(digest)  # such as a checkpoint that was moved
            if earlier is not None and earlier["sha256"] == digest:
                files[path] = earlier
            else:
                files[path] = {
                    "sha256": digest,
                    "bytes": size,
                    "key": f"{path}.{digest[:12]}" if path in keys else path,
                }
        return files

    def _own_index(self) -> Index:
        """Return the index; raises `RunInUseError` if another machine writes to the copy."""
        known, index, url = read_record(self._folder), read_index(self._storage), self._storage.url
        if known is None:
            raise StorageError(f"{self._folder} has lost its record of {url}", hint="run the same command again")
        if index is None:  # removed meanwhile
            return Index(known.run, self._name, known.writer)
        if index.writer != known.writer:
            raise RunInUseError(
                f"{url} was taken over by {index.host} at {index.written}; nothing more is uploaded from here",
                hint=f"{self._folder} is intact; stop the run on one of the machines, and use one URL per run",
            )
        return index
