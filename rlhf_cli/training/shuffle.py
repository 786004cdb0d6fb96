"""Seeded orders of training data, as pure functions, so that a resumed run sees the items an uninterrupted one sees."""

from __future__ import annotations

import hashlib

import torch


def shuffled(count: int, *, seed: int, epoch: int, name: str) -> list[int]:
    """Return the numbers 0 to `count` - 1 in the order of one epoch: torch's permutation for a seed of its own.

    The seed is the first 63 bits of SHA-256 of "shuffle <name> <seed> <epoch>".

    Args:
        count: number of items.
        seed: seed of the run.
        epoch: 0-based; every epoch has an order of its own.
        name: what is shuffled; orders of different names are independent.
    """
    digest = hashlib.sha256(f"shuffle {name} {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # torch takes seeds below 2**63
    return torch.randperm(count, generator=generator).tolist()


class EndlessShuffle:
    """The shuffled epochs one after another, addressed by position.

    Args:
        count: number of items, at least 1.
        seed: seed of the run.
        name: what is shuffled, see `shuffled`.
    """

    def __init__(self, count: int, *, seed: int, name: str) -> None:
        self._count, self._seed, self._name = count, seed, name
        self._epoch, self._order = -1, [0]

    def slice(self, start: int, stop: int) -> list[int]:
        """Return the items at the positions `start` to `stop` - 1; position p lies in epoch p // count."""
        return [self._order_of(position // self._count)[position % self._count] for position in range(start, stop)]

    def _order_of(self, epoch: int) -> list[int]:
        """Return the order of an epoch; the last one is cached, since most slices lie within one epoch."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(self._count, seed=self._seed, epoch=epoch, name=self._name)
        return self._order
