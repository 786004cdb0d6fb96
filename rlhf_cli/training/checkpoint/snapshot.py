"""A copy of a checkpoint's tensors in host memory, which a thread writes while training goes on.

Of sharded tensors each process copies its part, and sends it to process 0 when that writes it. These messages have a
process group of their own: those of the training go on meanwhile, and neither may take the place of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_cli.distributed.process_group import TIMEOUT
from rlhf_cli.models.sharding import is_divided, local


class ShardGroup:
    """The processes that together hold every sharded tensor, process 0 first among them; every process makes one.

    Args:
        ranks: of these processes.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = list(ranks)
        self._group: Any = distributed.new_group(self.ranks, backend="gloo", timeout=TIMEOUT)

    def send(self, part: Tensor) -> None:
        """Send this process's part to process 0."""
        if part.numel():
            distributed.send(_bytes(part), dst=self.ranks[0], group=self._group)

    def join(self, own: Tensor, shape: torch.Size) -> Tensor:
        """Return a tensor of `shape`, from this process's part and those that the others send; process 0 calls this."""
        whole = torch.empty(shape, dtype=own.dtype)
        rows = -(-shape[0] // len(self.ranks))  # of all parts but the last ones
        whole[: len(own)] = own
        for number, rank in enumerate(self.ranks[1:], start=1):
            part = whole[number * rows : (number + 1) * rows]
            if part.numel():
                distributed.recv(_bytes(part), src=rank, group=self._group)
        return whole


_groups: dict[tuple[int, ...], ShardGroup] = {}


def shard_group(tensor: DTensor) -> ShardGroup:
    """Return the group of the processes that hold a tensor; every process calls this, and the group is made once."""
    ranks = _ranks(tensor)
    if ranks not in _groups:
        _groups[ranks] = ShardGroup(ranks)
    return _groups[ranks]


def _ranks(tensor: DTensor) -> tuple[int, ...]:
    # With hybrid sharding the groups have copies of each other's parts: those of the first are enough.
    mesh = tensor.device_mesh
    return tuple(mesh.mesh.reshape(-1, mesh.size(mesh.ndim - 1))[0].tolist())


def _bytes(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as bytes: gloo does not send every type."""
    return tensor.reshape(-1).view(torch.uint8)


class Snapshot:
    """Copies of tensors, in host memory; every process of the run makes one, calls `copy`, and hands it to its thread.

    Args:
        tensors: name -> tensor on any device, maybe sharded.
        names: the order in which they are written.
        group: of sharded tensors; None if all are whole.
        is_main: whether this process writes; others copy only their parts of sharded tensors.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], names: Sequence[str], group: ShardGroup | None, *, is_main: bool
    ) -> None:
        self._shapes = {name: tensors[name].shape for name in names if is_divided(tensors[name])}
        self._group = group
        copied = names if is_main else [name for name in names if name in self._shapes and is_part_of(group)]
        self._own = {name: local(tensors[name].detach()) for name in copied}
        self._copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self) -> None:
        """Copy what this process holds."""
        # To the CPU and in row-major order, also from there: `to` and `contiguous` alone would not copy.
        own, self._own = self._own, {}
        self._copies = {name: torch.empty_like(one, device="cpu", memory_format=torch.contiguous_format).copy_(one)
                        for name, one in own.items()}  # fmt: skip

    def take(self, name: str) -> Tensor:
        """Return a tensor, whole, and forget its copy; process 0 calls this in the order of the names.

        After an error of receiving the other parts nothing is left, since nobody knows how much of it was sent.
        """
        if name not in self._shapes or self._group is None:
            return self._copies.pop(name)
        copies, self._copies = self._copies, {}
        whole = self._group.join(copies.pop(name), self._shapes[name])
        self._copies = copies
        return whole

    def finish(self) -> None:
        """Take part in what is left: process 0 receives what it did not write, the others send their parts."""
        for name in list(self._copies):
            self.take(name)

    def send(self) -> None:
        """Send all parts; the processes other than process 0 call this."""
        assert self._group is not None
        for name in list(self._copies):
            self._group.send(self._copies.pop(name))


def is_part_of(group: ShardGroup | None) -> bool:
    """Whether process 0 needs this process's parts."""
    return group is not None and distributed.get_rank() in group.ranks
