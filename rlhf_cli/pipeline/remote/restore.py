"""Downloads a remote copy into a run directory that lacks its files."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from rlhf_cli.errors import StorageError
from rlhf_cli.files import fsync_tree, hash_file, rename, write_whole
from rlhf_cli.pipeline.disk_space import check_free_space
from rlhf_cli.pipeline.remote.index import Index, RemoteFile
from rlhf_cli.progress import warn
from rlhf_cli.run_log import LOG
from rlhf_cli.stages.base import KEPT
from rlhf_cli.storage import Moved, Storage, transfer_bar

_TIMES = 2
"""Downloads of a file whose content is not what it should be."""


def restore(storage: Storage, index: Index, folder: Path) -> None:
    """Download the files of a copy that a run directory lacks.

    They are put in place when all are there; what was downloaded before an interruption is not downloaded again. A file
    that differs from its hash is skipped with a warning: its checkpoint or artifact then counts as damaged. A log that
    is there already continues that of the copy.

    Raises:
        StorageError: the storage cannot be used, or the damaged file cannot be made again.
        DiskError: there is not enough space.
    """
    partial = folder / ".remote.partial"
    lacking = {path: file for path, file in index.files.items() if path == LOG or not (folder / path).exists()}
    check_free_space(folder, sum(file["bytes"] for path, file in lacking.items() if not (partial / path).exists()))
    with transfer_bar(f"downloading from {storage.url}", sum(file["bytes"] for file in lacking.values())) as moved:
        for path, file in lacking.items():
            if _is_whole(partial / path, file):
                moved(file["bytes"])
            else:
                _download(storage, path, file, partial / path, moved)
    if partial.exists():
        fsync_tree(partial)
        _continue_log(partial / LOG, folder / LOG)
        _put(partial, folder)
        shutil.rmtree(partial)


def _download(storage: Storage, path: str, file: RemoteFile, target: Path, moved: Moved) -> None:
    for _ in range(_TIMES):
        with contextlib.suppress(FileNotFoundError):
            storage.download(file["key"], target, file["bytes"], moved)
            if _is_whole(target, file):
                return
            moved(-file["bytes"])
    target.unlink(missing_ok=True)
    moved(file["bytes"])
    what = f"{storage.url}/{file['key']} is missing or differs from its sha256"
    if path.startswith(f"{KEPT}/"):
        raise StorageError(what, hint="restore an earlier version of it, or use another URL and start without it")
    warn(f"{what}: continuing without it")


def _is_whole(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == file["bytes"] and hash_file(path) == file["sha256"]


def _continue_log(earlier: Path, log: Path) -> None:
    """Put the earlier lines of a log before it, unless that was done before an interruption."""
    if earlier.exists() and log.exists() and not log.read_bytes().startswith(before := earlier.read_bytes()):
        write_whole(log, before + log.read_bytes())


def _put(source: Path, target: Path) -> None:
    """Move a folder's content to another one; a folder that is missing there is moved as a whole."""
    for entry in sorted(source.iterdir()):
        if not (target / entry.name).exists():
            rename(entry, target / entry.name)
        elif entry.is_dir():
            _put(entry, target / entry.name)
