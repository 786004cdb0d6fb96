"""A copy of a run directory behind a URL, so that a machine that dies can be replaced by an empty one.

A thread looks for changes while the stages work, and uploads what is new. The copy is what its index lists, which is
replaced when everything in it is there: at any moment it is the run directory as it was at one earlier moment.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rlhf_cli.console import working
from rlhf_cli.distributed.signals import SignalStop
from rlhf_cli.errors import RLHFError, RunInUseError, StorageError, UsageError
from rlhf_cli.pipeline.manifest import now
from rlhf_cli.pipeline.remote.index import Index, Record, new_id, read_index, read_record
from rlhf_cli.pipeline.remote.restore import restore
from rlhf_cli.pipeline.remote.snapshot import scan
from rlhf_cli.pipeline.remote.upload import FAILURES, Uploader, locked
from rlhf_cli.progress import say, warn
from rlhf_cli.run_log import LOG
from rlhf_cli.storage import Moved, Storage, transfer_bar

POLL = 2.0
"""Seconds between two looks for new or removed files."""
_LONGEST_PAUSE = 300.0


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
        self._uploader = Uploader(self._storage, folder, name)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._left = 0

    @property
    def url(self) -> str:
        """Where the copy is."""
        return self._storage.url

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is uploaded, for example because another machine has taken over."""
        return self._failure is not None

    def begin(self) -> None:
        """Download what the copy has, unless it is of this run directory; then be the one who writes to it.

        Where the storage does not answer, a directory that has everything of the copy starts without it.

        Raises:
            StorageError: the storage cannot be used, and may have what this directory lacks.
            UsageError: the copy is of another run, or another machine has continued it.
        """
        with locked(self._folder):
            known = read_record(self._folder)
            if known is not None and known.url != self.url:
                known = None
            try:
                with working(f"reading {self.url} ..."):
                    index = read_index(self._storage)
            except StorageError as error:
                if known is None or not known.is_whole or known.before is not None or not error.is_temporary:
                    raise
                warn(f"the remote copy cannot be read: {error}; the run goes on without it until it can")
                return  # each upload looks whether another machine has taken over
            if index is None:
                index = Index(new_id() if known is None else known.run, self._name, "")
            elif known is None or index.writer not in (known.writer, known.before):
                self._check_replaceable(index, known)
                known = None
            mine = Record(self.url, index.run, new_id(), index.writer)
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
                    f"{self.url} has the run `{index.name}`, and the recipe is named `{self._name}`; {last}",
                    hint=f"use another URL, or continue that run with `--set name={index.name}`",
                )
            say(f"{self.url}: continuing the run in it; {last}")
        elif known is not None and known.run == index.run:
            raise UsageError(
                f"{self.url} is ahead of {self._folder}: {last}",
                hint=f"move {self._folder} away and run the same command again, which downloads what is there",
            )
        else:
            raise UsageError(
                f"{self.url} has another run than {self._folder}; {last}",
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
            is_whole = self._uploader.upload(lambda total: transfer_bar(f"uploading to {self.url}", total))
        except FAILURES as error:
            hint = f"{error.hint}; then " if isinstance(error, RLHFError) and error.hint is not None else ""
            raise StorageError(
                f"the remote copy is behind {self._folder}: {error}",
                hint=f"{hint}run the same command again, which uploads what is missing",
            ) from error
        if not is_whole:
            raise StorageError(
                f"the remote copy {self.url} is behind {self._folder}, whose files kept changing",
                hint="run the same command again, which uploads what is missing",
            )

    def _wait(self) -> None:
        """Wait until the thread has uploaded what it has begun to."""
        assert self._thread is not None
        left = self._left
        with transfer_bar(f"uploading to {self.url}", left) as moved, working(f"uploading to {self.url} ..."):
            while self._thread.is_alive():
                self._thread.join(0.2)
                moved(left - (left := min(self._left, left)))

    def _work(self, stop: SignalStop | None) -> None:
        pause, failures = POLL, 0
        while not self._closing.wait(pause):
            try:
                is_whole = not self._uploader.is_due() or self._uploader.upload(self._count)
            except FAILURES as error:
                failures += 1
                pause = min(POLL * 2**failures, _LONGEST_PAUSE)
                hint = f" ({error.hint})" if isinstance(error, RLHFError) and error.hint is not None else ""
                again = f"the run goes on; trying again in {pause:.0f} s"
                if self._closing.is_set():
                    again = "trying once more before this ends"
                warn(f"the remote copy is behind: {error}{hint}; {again}")
            except RunInUseError as error:
                self._failure = error
                warn(error.message)
                if stop is not None:
                    stop.request()
                return
            except Exception as error:  # raised by `finish`
                self._failure = error
                warn(f"the remote copy is not updated any more: {error}; the run goes on, and ends with this error")
                return
            else:
                if failures and is_whole:
                    say(f"the remote copy {self.url} is up to date again")
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
