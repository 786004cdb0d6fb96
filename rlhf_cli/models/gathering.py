"""Sharded weights that are gathered one after another for a process that writes or sends them.

Gathering is a message to all processes. One that fails to use what was gathered takes part in the rest, since the
others wait for it. One that fails to gather cannot: the others are in the middle of that message. It must end with its
error, and the launcher then ends the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from rlhf_cli.models.sharding import is_divided, whole

Item = TypeVar("Item")


class Gathering:
    """Sharded tensors that are gathered one after another for the process that writes them.

    Every process makes one from the same tensors. Process 0 takes them in the order of `names`. The others, and process
    0 where it fails on the way, call `finish`, which takes part in what is left.

    Args:
        tensors: name -> tensor, maybe sharded.
        names: their order.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self._tensors = tensors
        self._left = [name for name in names if is_divided(tensors[name])]

    def take(self, name: str) -> Tensor:
        """Return a tensor, whole. After an error of gathering nothing is left, see the module."""
        if not is_divided(self._tensors[name]):
            return whole(self._tensors[name])
        assert name == self._left[0]
        left, self._left = self._left[1:], []
        value = whole(self._tensors[name])
        self._left = left
        return value

    def finish(self) -> None:
        """Take part in gathering what was not taken."""
        while self._left:
            self.take(self._left[0])


class GatheredItems(Iterator[Item], Generic[Item]):
    """Items of an iterator that gathers weights, such as `merged_weights`, for a consumer that may stop or fail.

    Args:
        items: every process iterates over the same ones.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._failure: Exception | None = None

    def __next__(self) -> Item:
        """Return the next item."""
        try:
            return next(self._items)
        except StopIteration:
            raise
        except Exception as error:
            self._failure = error
            raise

    def finish(self) -> None:
        """Take part in gathering what was not taken.

        Raises:
            Exception: of the iterator, also where the consumer turned it into one of its own. Where processes agree on
                errors, it must not become one that they agree on, see the module.
        """
        if self._failure is not None:
            raise self._failure
        for _ in self:
            pass
