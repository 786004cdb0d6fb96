"""Loads the models of a chat in a thread, while the person types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from rlhf_cli.console import working


class BackgroundLoading:
    """Loads one after another.

    An error of a load is not kept: who needs what is missing then loads it again and sees why that fails.

    Args:
        parts: what each is called, and what loads it.
    """

    def __init__(self, parts: Sequence[tuple[str, Callable[[], object]]]) -> None:
        self._pool = ThreadPoolExecutor(1, "loading")
        self._parts = [(name, self._pool.submit(load)) for name, load in parts]

    def wait(self) -> None:
        """Wait for all, with a spinner that names the one that is being loaded."""
        for name, future in self._parts:
            if not future.done():
                with working(f"loading {name} ..."):
                    wait([future])

    def close(self) -> None:
        """Load no more. What is being loaded is waited for: torch aborts a process that ends while a thread runs it."""
        for _, future in self._parts:
            future.cancel()
        self.wait()
        self._pool.shutdown()
