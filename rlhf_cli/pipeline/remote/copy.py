"""A copy of a run directory behind a URL, so that a machine that dies can be replaced by an empty one.

A thread looks for changes while the stages work, and uploads what is new. The copy is what its index lists, which is
replaced when everything in it is there: at any moment it is the run directory as it was at one earlier moment.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from rlhf_cli.console import working
from rlhf_cli.distributed.signals import SignalStop
from rlhf_cli.errors import RLHFError, RunInUseError, StorageError, UsageError
from rlhf_cli.files import waiting_lock
from rlhf_cli.pipeline.manifest import now
from rlhf_cli.pipeline.remote.index import Index, Record, RemoteFile, new_id, read_index, read_record
from rlhf_cli.pipeline.remote.restore import restore
from rlhf_cli.pipeline.remote.snapshot import Seen, Taken, scan, take
from rlhf_cli.progress import say, warn
from rlhf_cli.run_log import LOG
from rlhf_cli.storage import Moved, Storage, transfer_bar

POLL = 2.0
"""Seconds between two looks for new or removed files."""
GROWTH = 15.0
"""Seconds after which files that only grow are uploaded again."""
_LONGEST_PAUSE = 300.0

_Bar = Callable[[int], AbstractContextManager[Moved]]


class RemoteCopy:
    """Keeps the copy of a run directory.

    Args:
        url: of the copy.
        folder: run directory, which exists.
        name: `name` of the recipe.

    Raises:
        StorageError: the driver of the storage is missing.
        UsageError: no such kind of storage.
    """

    def __init__(self, url: str, folder: Path, name: str) -> None:
        self._storage, self._folder, self._name = Storage(url), folder, name
        self._hashed: dict[str, tuple[tuple[int, ...], str]] = {}
        self._synced: Mapping[str, Seen] = {}
        self._synced_at = 0.0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._left = 0

    @property
    def _url(self) -> str:
        return self._storage.url

    def begin(self) -> None:
        """Download what the copy has, unless it is of this run directory; then be the one who writes to it.

        Raises:
            StorageError: the storage cannot be used.
            UsageError: the copy is of another run, or another machine has continued it.
        """
        with self._locked():
            with working(f"reading {self._url} ..."):
                index, known = read_index(self._storage), read_record(self._folder)
            if known is not None and known.url != self._url:
                known = None
            if index is None:
                index = Index(new_id() if known is None else known.run, self._name, "")
            elif known is None or index.writer not in (known.writer, known.before):
                self._check_replaceable(index, known)
                known = None
            mine = Record(self._url, index.run, new_id(), index.writer)
            if index.files and (known is None or not known.is_whole):
                replace(mine, is_whole=False).write(self._folder)
                restore(self._storage, index, self._folder)
            mine.write(self._folder)
            replace(index, writer=mine.writer, host=socket.gethostname(), written=now()).write(self._storage)
            replace(mine, before=None).write(self._folder)

    def _check_replaceable(self, index: Index, known: Record | None) -> None:
        """Raise `UsageError` unless this run directory is empty, and the copy may be one of its run."""
        last = f"{index.host} wrote to it last, at {index.written}"
        found = scan(self._folder)
        if found is not None and found.keys() <= {LOG}:
            if index.name != self._name:
                raise UsageError(
                    f"{self._url} has the run `{index.name}`, and the recipe is named `{self._name}`; {last}",
                    hint=f"use another URL, or continue that run with `--set name={index.name}`",
                )
            say(f"{self._url}: continuing the run in it; {last}")
        elif known is not None and known.run == index.run:
            raise UsageError(
                f"{self._url} is ahead of {self._folder}: {last}",
                hint=f"move {self._folder} away and run the same command again, which downloads what is there",
            )
        else:
            raise UsageError(
                f"{self._url} has another run than {self._folder}; {last}",
                hint="use another URL, or continue that run with another --run-dir",
            )

    def start(self, stop: SignalStop | None = None) -> None:
        """Upload what is new from now on; `stop` is asked to stop the command if another machine takes over."""
        self._thread = threading.Thread(target=self._work, args=(stop,), name="remote", daemon=True)
        self._thread.start()

    def abandon(self) -> None:
        """Upload nothing more; the copy stays what it is."""
        self._closing.set()

    def finish(self) -> None:
        """Upload the rest.

        Raises:
            StorageError: the copy is behind the run directory.
            RunInUseError: another machine has taken over.
        """
        self._closing.set()
        if self._thread is not None:
            self._wait()
        if self._failure is not None:
            raise self._failure
        try:
            is_whole = self._sync(lambda total: transfer_bar(f"uploading to {self._url}", total))
        except StorageError as error:
            raise StorageError(
                f"the remote copy is behind {self._folder}: {error.message}",
                hint=f"{error.hint or 'see above'}; then run the same command again, which uploads what is missing",
            ) from error
        if not is_whole:
            raise StorageError(
                f"the remote copy {self._url} is behind {self._folder}, whose files kept changing",
                hint="run the same command again, which uploads what is missing",
            )

    def _wait(self) -> None:
        """Wait until the thread has uploaded what it has begun to."""
        assert self._thread is not None
        left = self._left
        with transfer_bar(f"uploading to {self._url}", left) as moved, working(f"uploading to {self._url} ..."):
            while self._thread.is_alive():
                self._thread.join(0.2)
                moved(left - (left := min(self._left, left)))

    def _work(self, stop: SignalStop | None) -> None:
        pause, failures = POLL, 0
        while not self._closing.wait(pause):
            try:
                is_whole = not self._is_due() or self._sync(self._count)
            except StorageError as error:
                failures += 1
                pause = min(POLL * 2**failures, _LONGEST_PAUSE)
                hint = "" if error.hint is None else f" ({error.hint})"
                again = f"the run goes on; trying again in {pause:.0f} s"
                warn(f"the remote copy is behind: {error.message}{hint}; {again}")
            except Exception as error:  # raised by `finish`
                self._failure = error
                if isinstance(error, RLHFError):
                    warn(error.message)
                if stop is not None:
                    stop.request()
                return
            else:
                if failures and is_whole:
                    say(f"the remote copy {self._url} is up to date again")
                    failures = 0
                pause = POLL

    @contextlib.contextmanager
    def _count(self, total: int) -> Iterator[Moved]:
        """Show nothing, but remember how many bytes are left, in case that `finish` waits for them."""
        self._left = total

        def moved(count: int) -> None:
            self._left -= count

        try:
            yield moved
        finally:
            self._left = 0

    def _is_due(self) -> bool:
        """Whether files came, went or were replaced; or, after some time, grew."""
        found = scan(self._folder)
        if found is None:
            return False
        if {path: one.inode for path, one in found.items()} != {path: one.inode for path, one in self._synced.items()}:
            return True
        has_grown = any(one != self._synced[path] for path, one in found.items() if path != LOG)
        return has_grown and time.monotonic() - self._synced_at > GROWTH

    def _sync(self, bar: _Bar) -> bool:
        """Upload what is new; False if the files kept changing."""
        with self._locked():
            index = self._own_index()
            links = self._folder / ".remote.links"
            found = take(self._folder, links, lambda *file: self._is_there(index, *file))
            if found is None:
                return False
            seen, taken = found
            files = self._files(index, seen, taken)
            before = {file["key"] for file in index.files.values()}
            uploads = [path for path, file in files.items() if file["key"] not in before]
            if files != index.files or index.garbage:
                new = [files[path]["key"] for path in uploads]
                replace(index, garbage=sorted({*index.garbage, *new})).write(self._storage)
                with bar(sum(files[path]["bytes"] for path in uploads)) as moved:
                    for path in uploads:
                        self._storage.upload(taken[path].content, files[path]["key"], moved)
                if any(taken[path].size != files[path]["bytes"] for path in uploads):
                    return False
                garbage = {*index.garbage, *before} - {file["key"] for file in files.values()}
                index = replace(self._own_index(), files=files, garbage=sorted(garbage), written=now())
                index.write(self._storage)
                if garbage:
                    self._storage.delete(index.garbage)
                    replace(index, garbage=[]).write(self._storage)
            shutil.rmtree(links, ignore_errors=True)
            self._synced, self._synced_at = seen, time.monotonic()
            return True

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
        known, index = read_record(self._folder), read_index(self._storage)
        if known is None:
            raise StorageError(f"{self._folder} has lost its record of {self._url}", hint="run the same command again")
        if index is None:  # removed meanwhile
            return Index(known.run, self._name, known.writer)
        if index.writer != known.writer:
            raise RunInUseError(
                f"{self._url} was taken over by {index.host} at {index.written}; nothing more is uploaded from here",
                hint=f"{self._folder} is intact; stop the run on one of the machines, and use one URL per run",
            )
        return index

    def _locked(self) -> AbstractContextManager[None]:
        """Wait until no other process of this machine reads or writes the copy of this run directory."""
        return waiting_lock(self._folder / ".remote.lock")
