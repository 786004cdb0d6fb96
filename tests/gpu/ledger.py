"""What a program did with the fake device: host synchronizations, uploads and bytes, by our source line."""

from __future__ import annotations

import linecache
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

PACKAGE = "/rlhf_cli/"


class Event(NamedTuple):
    """Something that costs time on a real GPU.

    Attributes:
        kind: `sync`: the host waits for the device; `upload`: a copy of pageable host memory to the device; `backward`:
            a backward pass was started.
        what: the operation, such as `item` or `mask index`.
        line: file and line in rlhf_cli that caused it, such as `generation/decoding.py:98`.
    """

    kind: str
    what: str
    line: str


@dataclass
class Ledger:
    """Counts of one process.

    Attributes:
        events: how often each event occurred.
        live: bytes of all tensors on each device.
        peak: largest `live` of each device.
        largest: bytes by our line that allocated them, when the peak of all devices was reached.
    """

    events: Counter[Event] = field(default_factory=Counter)
    live: Counter[int] = field(default_factory=Counter)
    peak: Counter[int] = field(default_factory=Counter)
    largest: dict[str, int] = field(default_factory=dict)
    follow: bool = False
    """Whether to record `largest`, which takes time."""
    is_counting: bool = True
    _held: Counter[str] = field(default_factory=Counter)
    _known: dict[int, tuple[int, int, str]] = field(default_factory=dict)
    """Storage -> its bytes, its device and the line that made it."""
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def count(self, kind: str, what: str) -> None:
        """Count an event at the line of rlhf_cli that is running."""
        if self.is_counting:
            self.events[Event(kind, what, source_line())] += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count neither events nor bytes of new storages inside the context."""
        before, self.is_counting = self.is_counting, False
        try:
            yield
        finally:
            self.is_counting = before

    def hold(self, storage: Any, device: int) -> None:
        """Account for a storage until torch frees it; views of it are not counted again."""
        if not self.is_counting:
            return
        with self._lock:
            key = storage._cdata
            if key in self._known:
                return
            self._known[key] = (0, device, source_line() if self.follow else "")
            self._resize(key, storage.nbytes())
            weakref.finalize(storage, self._free, key).atexit = False

    def resized(self, storage: Any) -> None:
        """Account for the new size of a storage, as `fully_shard` frees and allocates what it gathers."""
        with self._lock:
            if (key := storage._cdata) in self._known:
                self._resize(key, storage.nbytes())

    def _resize(self, key: int, size: int) -> None:
        before, device, line = self._known[key]
        self._known[key] = (size, device, line)
        self.live[device] += size - before
        self._held[line] += size - before
        if self.live[device] > self.peak[device]:
            self.peak[device] = self.live[device]
            if self.follow:
                self.largest = dict(self._held)

    def _free(self, key: int) -> None:
        with self._lock:
            self._resize(key, 0)
            del self._known[key]

    def reset(self) -> None:
        """Forget all events, and the peaks."""
        self.events.clear()
        self.peak = Counter(self.live)


def source_line() -> str:
    """Return the innermost line of rlhf_cli that is running, `file:line` within the package; `?` outside of it.

    Autograd runs the operations of a backward pass in threads of its own, under whichever line started the pass.
    """
    found = _line_in(sys._getframe(1))
    if found is None and threading.current_thread() is not threading.main_thread():
        found = _line_in(sys._current_frames().get(threading.main_thread().ident or 0))
    return found or "?"


def _line_in(frame: FrameType | None) -> str | None:
    while frame is not None:
        _, is_ours, name = frame.f_code.co_filename.rpartition(PACKAGE)
        if is_ours:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def source_text(package: str, line: str) -> str:
    """Return the code of a line from `source_line`.

    Args:
        package: folder that holds rlhf_cli.
        line: `file:line`.
    """
    name, _, number = line.rpartition(":")
    return linecache.getline(f"{package}{PACKAGE}{name}", int(number)).strip() if name else ""
