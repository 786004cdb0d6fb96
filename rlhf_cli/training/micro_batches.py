"""Micro-batches: how the rows of a step are cut into forward and backward passes, and what happens without memory.

Every loss is a sum over tokens or groups divided by those of the whole step, so the cut changes a gradient by rounding
only. A pass that gets no memory is repeated in smaller micro-batches, together with all passes since the gradients were
zero: a backward pass that failed may have added a part of its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from rlhf_cli.memory import free_memory, is_out_of_memory
from rlhf_cli.progress import warn

Result = TypeVar("Result")

TokensOf = Callable[[Sequence[int]], int]
"""The tokens of a pass over some rows, padding included."""


class MicroBatches:
    """Cuts rows into micro-batches of one process.

    Args:
        rows: most rows per micro-batch, without `tokens`.
        tokens: most tokens per micro-batch, or None; one row may have more.
        setting: name of the setting with `tokens`, for messages.
        repeats: whether passes are repeated that got no memory. Those over a sharded model are not: all processes would
            have to repeat them.

    Attributes:
        limit: most tokens of a pass since one got no memory, in this process; None before. It is not kept when a run
            resumes, and other processes keep theirs: it changes sums by rounding only.
    """

    def __init__(
        self, rows: int, tokens: int | None = None, *, setting: str = "micro_batch_tokens", repeats: bool = True
    ) -> None:
        self._rows, self._tokens, self._setting, self._repeats = rows, tokens, setting, repeats
        self.limit: int | None = None
        self._running: tuple[int, int] = (0, 0)

    def cut(self, rows: Sequence[int], tokens_of: TokensOf, *, most: int | None = None) -> list[list[int]]:
        """Cut rows, in their order, into the micro-batches of all processes; each gets the same result.

        Args:
            rows: rows of a step.
            tokens_of: measures some of them.
            most: rows per micro-batch that must not be exceeded.
        """
        by_rows = len(rows) if self._tokens is not None else self._rows
        return _cut(rows, tokens_of, by_rows if most is None else min(by_rows, most), self._tokens)

    def own(self, parts: Iterable[Sequence[int]], tokens_of: TokensOf) -> Iterator[list[int]]:
        """Yield this process's micro-batches, cut further where one of that size got no memory before."""
        for part in parts:
            for rows in _cut(part, tokens_of, len(part), self.limit):
                self._running = (tokens_of(rows), len(rows))
                yield rows

    def run(self, work: Callable[[], Result], undo: Callable[[], object] = lambda: None) -> Result:
        """Return `work()`; where it gets no memory, undo it and repeat it with half the tokens per micro-batch.

        Args:
            work: passes over the micro-batches that `own` yields, without messages to other processes.
            undo: removes what a part of it has changed: gradients.

        Raises:
            RuntimeError, MemoryError: a micro-batch of one row got no memory, or something else is wrong.
        """
        while True:
            self._running = (0, 0)
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                tokens, rows = self._running
                if not is_out_of_memory(error) or rows < 2 or not self._repeats:
                    raise
            # Behind the handler, since the error holds the activations of the pass.
            free_memory()
            half = max(tokens // 2, 1)
            self.limit = half if self.limit is None else min(self.limit, half)
            warn(
                f"a pass over {tokens:,} tokens ran out of memory: passes of this process now have at most "
                f"{self.limit:,}; `{self._setting}: {self.limit}` starts a run with this limit"
            )
            undo()  # which may run passes itself


def _cut(rows: Sequence[int], tokens_of: TokensOf, most_rows: int, most_tokens: int | None) -> list[list[int]]:
    parts: list[list[int]] = []
    for row in rows:
        last = parts[-1] if parts else []
        is_full = len(last) >= most_rows or (most_tokens is not None and tokens_of([*last, row]) > most_tokens)
        if not last or is_full:
            parts.append([row])
        else:
            last.append(row)
    return parts
