"""Data and models behind URLs, downloaded into a cache on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from rlhf_cli.errors import DataError, DiskError
from rlhf_cli.files import fsync_tree, rename, waiting_lock
from rlhf_cli.pipeline.disk_space import check_free_space
from rlhf_cli.storage import Storage, is_inside, transfer_bar

_fetched: dict[str, str] = {}
_FULL = "free disk space there, or set XDG_CACHE_HOME to a folder on another disk that you can write to"


def fetch(url: str) -> str:
    """Return the path of a copy of the file or folder behind a URL; downloads it unless this version is in the cache.

    Args:
        url: of a file or folder; what follows `#` is put behind the path.

    Raises:
        DataError: there is nothing behind it.
        StorageError: the storage cannot be used.
        DiskError: there is not enough space, or the cache cannot be written.
    """
    whole, mark, split = url.partition("#")
    storage = Storage(whole)
    try:
        files = storage.listing()
    except FileNotFoundError:
        raise DataError(f"{whole}: no such file or folder", hint="check the URL") from None
    version = hashlib.sha256(repr((whole, files)).encode()).hexdigest()[:16]
    folder = cache() / version
    target = folder / (PurePosixPath(urlsplit(whole).path).name or "data")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with waiting_lock(folder.with_name(f"{folder.name}.lock")):
            if not folder.exists():
                _download(storage, files, folder, target.name)
    except DiskError as error:
        error.hint = _FULL
        raise
    except OSError as error:
        raise DiskError(f"cannot write in {cache()}: {(error.strerror or str(error)).lower()}", hint=_FULL) from error
    _fetched[f"{target}{mark}{split}"] = url
    return f"{target}{mark}{split}"


def url_of(path: str) -> str | None:
    """Return the URL that `fetch` returned a path for in this process; None for other paths."""
    return _fetched.get(path)


def cache() -> Path:
    """Return the folder of downloaded data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf" / "data"


def _download(storage: Storage, files: dict[str, tuple[int | None, str]], folder: Path, name: str) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    total = sum(size or 0 for size, _ in files.values())
    check_free_space(partial, total)
    with transfer_bar(f"downloading {storage.url}", total) as moved:
        for path, (size, _) in files.items():
            if not is_inside(path):
                raise DataError(f"{storage.url}: has a file named `{path}`", hint="rename it")
            with contextlib.suppress(FileNotFoundError):
                storage.download(path, partial / name / path, size, moved)
                if size in (None, (partial / name / path).stat().st_size):
                    continue
            raise DataError(f"{storage.url}/{path}: changed during the download", hint="run the command again")
    fsync_tree(partial)
    rename(partial, folder)
