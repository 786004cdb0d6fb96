"""Files behind a URL, through fsspec: object storage such as `s3://bucket/runs/mine`, and whatever else fsspec knows.

Drivers, such as s3fs, are packages of their own. They read credentials where the tools of their provider do.
"""

from __future__ import annotations

import contextlib
import errno
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from rlhf_cli.errors import DiskError, RLHFError, StorageError, UsageError
from rlhf_cli.progress import task

PAUSE = 1.0
"""Seconds before the first retry; each further one waits twice as long."""
TRIES = 4

_DRIVERS = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    "sftp": "paramiko",
}
_CREDENTIALS = {
    "s3fs": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, run `aws configure`, or give the machine a role",
    "gcsfs": "run `gcloud auth application-default login`, or give the machine a service account",
    "adlfs": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}

_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")
Moved = Callable[[int], object]
"""Called with the number of bytes that were transferred since the last call."""


def is_url(name: str) -> bool:
    """Whether a name is a URL rather than a path."""
    return "://" in name


def is_inside(name: str) -> bool:
    """Whether a name of a file, as a storage lists it, leads to a place inside of the folder that it is put into."""
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def has_password(url: str) -> bool:
    """Whether a URL has a password, as in `sftp://name:password@host/folder`."""
    return re.match("[^/]*://[^/@]*:[^/@]*@", url) is not None


def without_secrets(text: str) -> str:
    """Return a text in which URLs have neither a password nor a query."""
    return re.sub(r"(://[^\s?]*\?)\S*", r"\1...", re.sub("://[^/\\s]*:[^/\\s]*@", "://...@", text))


class Storage:
    """A folder behind a URL.

    Args:
        url: of the folder; it need not exist.

    Raises:
        StorageError: the driver is not installed.
        UsageError: fsspec knows no such URL, or it has a password.
    """

    def __init__(self, url: str) -> None:
        if has_password(url):
            raise UsageError(
                f"{url.partition('://')[0]}://...: a password in a URL, which would be written to files",
                hint="leave it out: credentials are read where the tools of the provider read them",
            )
        self.url = url.rstrip("/")
        self._protocol = self.url.partition("://")[0]
        own: dict[str, Any] = {"auto_mkdir": True} if self._protocol in ("file", "local") else {}
        with self._explained():
            from fsspec.core import url_to_fs

            # Other users of the same file system in this process have transactions of their own.
            self._files, self._root = url_to_fs(self.url, skip_instance_cache=True, use_listings_cache=False, **own)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is none."""

        def read() -> bytes | None:
            with self._explained():
                try:
                    return self._files.cat_file(self._path(name))
                except FileNotFoundError:
                    return None

        return retried(read)

    def listing(self) -> dict[str, tuple[int | None, str]]:
        """Return the size in bytes and what identifies the version of each file: of the one at the URL, whose name is
        then "", or of those under it.

        Raises:
            FileNotFoundError: there is none.
        """

        def listing() -> dict[str, tuple[int | None, str]]:
            with self._explained():
                try:
                    found = self._files.info(self._root)
                    if found["type"] == "file":
                        return {"": (found.get("size"), _version(found))}
                    inside = self._files.find(self._root, detail=True)
                except FileNotFoundError as error:
                    raise _cause(error) from None
            start = len(self._root.rstrip("/")) + 1
            return {path[start:]: (one.get("size"), _version(one)) for path, one in sorted(inside.items())}

        try:
            found = retried(listing)
        except _Missing:
            found = {}
        if not found:
            raise FileNotFoundError(self.url)
        return found

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""

        def write() -> None:
            with self._explained(), self._files.transaction:
                self._files.pipe_file(self._path(name), content)

        retried(write)

    def upload(self, content: bytes | Path, name: str, moved: Moved) -> None:
        """Upload bytes or a file. If the process dies, the target may be incomplete."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size

        def upload() -> None:
            with self._explained(), _counted(size, moved) as callback:
                if isinstance(content, bytes):
                    self._files.pipe_file(self._path(name), content)
                else:
                    try:
                        self._files.put_file(str(content), self._path(name), callback=callback)
                    except OSError as error:
                        if error.filename != str(content) or error.filename2 is not None:  # copying names both files
                            raise
                        raise StorageError(f"cannot read {content}: {_reason(error)}") from error

        retried(upload)

    def download(self, name: str, target: Path, size: int | None, moved: Moved) -> None:
        """Download a file of a size in bytes, if that is known.

        Raises:
            FileNotFoundError: there is no such file.
            DiskError: the disk of this machine is full or cannot be written.
        """
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(target, error) from error

        def download() -> None:
            with self._explained(), _counted(size or 0, moved) as callback:
                try:
                    self._files.get_file(self._path(name), str(target), callback=callback)
                except FileNotFoundError:
                    raise _Missing from None
                except OSError as error:
                    if error.errno in (*_FULL, errno.EROFS) or error.filename == str(target):
                        raise _unwritable(target, error) from error
                    raise

        try:
            retried(download)
        except _Missing:
            raise FileNotFoundError(f"{self.url}/{name}") from None

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; missing ones are skipped."""
        for name in names:
            with self._explained(), contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn any error of fsspec and its drivers into one that says where, what and how to fix it."""
        try:
            yield
        except (RLHFError, _Missing):
            raise
        except Exception as error:  # drivers raise exceptions of many libraries
            raise self._error(error) from error

    def _error(self, error: Exception) -> RLHFError:
        reason = _reason(error)
        driver = _DRIVERS.get(self._protocol, "")
        kind = type(error).__name__.lower()
        if isinstance(error, ImportError):
            what, hint = (f"needs the package `{driver}`", f"pip install {driver}") if driver else (reason, None)
            return StorageError(f"{self.url}: {what}", hint=hint)
        if isinstance(error, ValueError) and "protocol not known" in reason.lower():
            hint = "use s3://, gs://, az:// or another URL that fsspec knows"
            return UsageError(f"{self.url}: no such kind of storage: `{self._protocol}`", hint=hint)
        if "credential" in kind or "credential" in reason.lower():
            hint = _CREDENTIALS.get(driver, "see the documentation of its fsspec driver")
            return StorageError(f"{self.url}: no usable credentials: {reason}", hint=hint)
        if isinstance(error, OSError) and error.errno in _FULL:
            return StorageError(f"{self.url}: {reason}", hint="free disk space, or raise the quota", is_temporary=True)
        is_refused = isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)
        if is_refused or (isinstance(error, OSError) and error.errno == errno.EROFS):
            hint = "allow this machine to read, write, list and delete there, or use other credentials"
            if driver == "aiohttp":
                hint = "download what is there, for example with curl, and give its path"
            return StorageError(f"{self.url}: access denied: {reason}", hint=hint)
        if isinstance(error, FileNotFoundError):
            hint = "check the name of the bucket, and create it"
            return StorageError(f"{self.url}: no such bucket: {reason}", hint=hint)
        hint = "check the network and the address" + (" (AWS_ENDPOINT_URL)" if driver == "s3fs" else "")
        return StorageError(f"{self.url}: {reason}", hint=hint, is_temporary=True)


@contextlib.contextmanager
def transfer_bar(label: str, total: int) -> Iterator[Moved]:
    """Show the progress of a transfer of `total` bytes, if there is anything to transfer."""
    if not total:
        yield lambda count: None
        return
    done = 0
    with task(label, math.ceil(total / 1e6), "MB", saves=False) as bar:

        def moved(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            bar.advance(math.ceil(done / 1e6) - math.ceil(before / 1e6))

        yield moved


class _Missing(Exception):  # noqa: N818  (never leaves this module)
    """There is no such file."""


def _cause(error: FileNotFoundError) -> Exception:
    """Return what made a driver say that there is no such file: fsspec's HTTP says so of any error."""
    cause = error.__cause__
    is_other = isinstance(cause, OSError) or getattr(cause, "status", 404) not in (404, 410)
    return cause if isinstance(cause, Exception) and is_other else _Missing()


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _unwritable(target: Path, error: OSError) -> DiskError:
    hint = "free disk space there, or make the folder writable"
    return DiskError(f"cannot write {target}: {(error.strerror or str(error)).lower()}", hint=hint)


def _version(found: dict[str, Any]) -> str:
    """Return what changes with the content of a file, as far as its storage tells."""
    known = {"etag", "md5hash", "content_md5", "digest", "last_modified", "lastmodified", "mtime", "generation", "size"}
    names = {name: name.lower().replace("-", "_") for name in sorted(found)}  # of HTTP: Last-Modified
    return repr([(name, str(found[name])) for name, plain in names.items() if plain in known])


def retried(do: Callable[[], T]) -> T:
    """Do something up to `TRIES` times, until it does not fail or would not succeed later either.

    Raises:
        StorageError: of the last attempt.
    """
    for attempt in range(TRIES - 1):
        try:
            return do()
        except StorageError as error:
            if not error.is_temporary:
                raise
            time.sleep(PAUSE * 2**attempt)
    return do()


@contextlib.contextmanager
def _counted(size: int, moved: Moved) -> Iterator[Any]:
    """Yield a callback for fsspec that counts transferred bytes; what a driver does not count is counted at the end."""
    from fsspec.callbacks import Callback

    class Counted(Callback):
        counted = 0

        def relative_update(self, inc: int = 1) -> None:
            self.counted += inc
            moved(inc)

    callback = Counted()
    try:
        yield callback
    except BaseException:
        moved(-callback.counted)
        raise
    moved(size - callback.counted)
