"""The processes of one run: which of them this is, and the little they tell one another.

A launcher (`rlhf --processes N`, torchrun, `accelerate launch`) starts the same command several times and tells each
its rank through the environment. Everything goes through accelerate's state, so that whatever it starts works; a single
process pays nothing and imports nothing.

What is exchanged is small: sums of gradients, and facts about answers as JSON. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_cli.distributed.ranks import rank, world_size
from rlhf_cli.distributed.watchdog import waiting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Item = TypeVar("Item")


class ProcessGroup:
    """Exchanges between the processes of a run. Every method that exchanges is called by all of them, in one order.

    Args:
        device: on which tensors are summed; messages travel there too where the backend is not for the CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.index, self.count = rank(), world_size()
        self._device = device

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and speaks to people."""
        return self.index == 0

    def shard(self, items: Sequence[Item]) -> list[Item]:
        """This process's share of `items`, every `count`-th; the others have the rest. May be empty."""
        return list(items[self.index :: self.count])

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in place; many small ones travel as one message."""
        if self.count == 1 or not tensors:
            return
        import torch

        with torch.no_grad():
            for together in _messages(tensors):
                flat = self._state.reduce(torch.cat([tensor.reshape(-1) for tensor in together]))
                for tensor, part in zip(together, flat.split([one.numel() for one in together]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def all_gather_object(self, item: Any) -> list[Any]:
        """What every process holds, in the order of their numbers; anything JSON can say (floats keep every bit)."""
        if self.count == 1:
            return [item]
        return [json.loads(text) for text in self._state.exchange(json.dumps(item).encode())]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return any(self.all_gather_object(flag))

    def barrier(self) -> None:
        """Return once every process has come here."""
        self.all_gather_object(None)

    @cached_property
    def _state(self) -> _Exchange:
        return _Exchange(self._device)


_MESSAGE = 2**24
"""Most numbers in one message, unless a single tensor has more: a copy of all gradients would be a model's memory."""


def _messages(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors in their order, cut where the dtype changes or a message is full."""
    messages: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not messages or messages[-1][0].dtype != tensor.dtype or tensor.numel() > room:
            messages.append([])
            room = _MESSAGE
        messages[-1].append(tensor)
        room -= tensor.numel()
    return messages


class _Exchange:
    """Collectives of torch: messages on the CPU by gloo, tensors where they are, by NCCL on a GPU."""

    def __init__(self, device: torch.device | None) -> None:
        import torch
        from accelerate import PartialState

        from rlhf_cli.distributed.rendezvous import join

        join()
        self._device = torch.device("cpu") if device is None else device
        # accelerate finds that group and reads the launcher's environment; `cpu=True` keeps it from looking for a GPU.
        state = PartialState(cpu=self._device.type == "cpu")
        if state.num_processes != world_size():
            raise RuntimeError(f"accelerate counts {state.num_processes} processes where {world_size()} were started")

    def reduce(self, flat: Tensor) -> Tensor:
        """Sum over the processes."""
        import torch.distributed

        there = flat.to(self._device)
        with waiting():
            torch.distributed.all_reduce(there)
            if there.is_cuda:  # NCCL returns at once; the wait would come later, where it is not known as one
                torch.cuda.current_stream(there.device).synchronize()
        return there.to(flat.device)

    def exchange(self, message: bytes) -> list[bytes]:
        """Every process's message."""
        import torch
        import torch.distributed

        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(world_size())]
        with waiting():
            torch.distributed.all_gather(sizes, torch.tensor([len(message)]))
        padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
        padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        found = [torch.zeros_like(padded) for _ in range(world_size())]
        with waiting():
            torch.distributed.all_gather(found, padded)
        return [row[: int(size)].numpy().tobytes() for row, size in zip(found, sizes, strict=True)]
