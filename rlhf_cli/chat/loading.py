"""Loads the models of a chat in a thread, while the person types."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from threading import Event, Thread

from rlhf_cli.console import working


class BackgroundLoading:
    """Loads one after another.

    An error of a load is not kept: who needs what is missing then loads it again and sees why that fails.

    Args:
        parts: what each is called, and what loads it.
    """

    def __init__(self, parts: Sequence[tuple[str, Callable[[], object]]]) -> None:
        self._parts = [(name, load, Event()) for name, load in parts]
        self._is_closed = False
        # A daemon: the command ends without Python's teardown, in which torch aborts while a thread runs it.
        Thread(target=self._load, name="loading", daemon=True).start()

    def _load(self) -> None:
        for _, load, has_ended in self._parts:
            if not self._is_closed:
                with contextlib.suppress(BaseException):  # see the class; a panic of tokenizers is not an Exception
                    load()
            has_ended.set()

    def wait(self) -> None:
        """Wait for all, with a spinner that names the one that is being loaded."""
        for name, _, has_ended in self._parts:
            if not has_ended.is_set():
                with working(f"loading {name} ..."):
                    has_ended.wait()

    def close(self) -> None:
        """Load no more, without waiting for what is being loaded: the process is about to end."""
        self._is_closed = True
