"""Transactions of a labeling session: locking, and keeping the in-memory state in step with the store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_cli.labeling.session.state import LabelState
from rlhf_cli.labeling.session.store import LabelStore


class TransactionalState:
    """A store and its state, read and changed in transactions. May be called from several threads.

    Args:
        path: file of the store.
        create: create the file if it does not exist.
        read_only: open for reading only; needs no write permission and waits for no lock.
        clock: seconds since 1970.

    Attributes:
        state: sums of the rows read so far; valid inside `writing` and `reading`.

    Raises:
        DataError, UsageError, DiskError: as `LabelStore`.
    """

    def __init__(self, path: Path, *, create: bool, read_only: bool, clock: Callable[[], float]) -> None:
        self.store = LabelStore(path, create=create, read_only=read_only)
        self._clock = clock
        self._lock = threading.RLock()
        self.state = LabelState(self.store)
        self._version: int | None = None

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self.store.close()

    def now(self) -> int:
        """Milliseconds since 1970."""
        return round(self._clock() * 1000)

    @contextmanager
    def writing(self) -> Iterator[LabelState]:
        """One transaction, on disk when the block ends; a nested block joins it.

        An error that leaves the block rolls everything back. An error caught inside the block does not.
        """
        with self._lock:
            if self.store.is_writing:
                yield self.state
                return
            try:
                with self.store.writing():
                    self._refresh()
                    yield self.state
            except BaseException:
                if self.store.has_written:  # the state is ahead of the file: read it again
                    self.state, self._version = LabelState(self.store), None
                raise

    @contextmanager
    def reading(self) -> Iterator[LabelState]:
        """The state, brought up to date with what other processes wrote."""
        with self._lock:
            if not self.store.is_writing and self.store.version() != self._version:
                with self.store.reading():  # one consistent snapshot of all tables
                    self._refresh()
            yield self.state

    def _refresh(self) -> None:
        version = self.store.version()
        if version != self._version:
            self.state.catch_up()
            self._version = version
