"""The processes of one run: how they connect, and the collectives that stages use.

A launcher (`rlhf --processes N`, torchrun, `accelerate launch`) starts the same command several times and sets each
process's rank in the environment. All collectives use accelerate's state, so every launcher that accelerate supports
works. A single process imports nothing and exchanges nothing.

Messages are small: sums of gradients, and JSON about completions. Nothing is pickled.

Under `rlhf --processes` the supervisor opens the listening socket and passes it to rank 0, so no other program can take
the port first. Other launchers name an address and a port in the environment, as torch expects.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rlhf_cli.distributed.ranks import rank, world_size
from rlhf_cli.distributed.rendezvous import meet
from rlhf_cli.distributed.watchdog import waiting

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]  (documented, not listed)

Item = TypeVar("Item")
Result = TypeVar("Result")

LISTENER = "RLHF_LISTENER"
"""Environment variable with the file descriptor of the socket that rank 0 listens on."""

# One process may work for hours (hashing, reading data, calling a judge) while the others wait. If it dies, the
# launcher ends their wait; a time limit would end waits that are in order.
TIMEOUT = timedelta(days=30)


class ProcessGroup:
    """Collectives over the processes of a run. Every process must call the same collectives in the same order.

    Args:
        device: where tensors are summed; messages are exchanged on the CPU.
        size: processes of a group; the run is divided into groups of consecutive processes, and the collectives are
            those of this process's group. Every process of the run makes one at the same time. None is all processes.
    """

    def __init__(self, device: torch.device | None = None, *, size: int | None = None) -> None:
        self.index, self.count = rank() % (size or world_size()), size or world_size()
        self._device, self._group = device, None if size is None else _group(size)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints messages."""
        return self.index == 0

    def shard(self, items: Sequence[Item]) -> list[Item]:
        """This process's items: every `count`-th, beginning at its index. May be empty."""
        return list(items[self.index :: self.count])

    def map(self, items: Sequence[Item], work: Callable[[list[Item]], list[Result]]) -> list[Result]:
        """Apply `work` to each process's shard and return the results of all items to every process, in their order.

        Args:
            items: N items, the same in every process; N may be smaller than the number of processes.
            work: maps a list of items to a list of as many results; JSON must be able to hold them.
        """
        shards = self.all_gather_object(work(self.shard(items)))
        return [shards[index % self.count][index // self.count] for index in range(len(items))]

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in place; small tensors share one message."""
        if self.count == 1 or not tensors:
            return
        import torch

        with torch.no_grad():
            for message in _messages(tensors):
                flat = self._state.reduce(torch.cat([tensor.reshape(-1) for tensor in message]))
                for tensor, part in zip(message, flat.split([one.numel() for one in message]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def all_gather_object(self, item: Any) -> list[Any]:
        """Every process's item, in order of rank. Items are sent as JSON, which keeps every bit of a float."""
        if self.count == 1:
            return [item]
        return [json.loads(text) for text in self._state.exchange(json.dumps(item).encode(), self.count)]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return any(self.all_gather_object(flag))

    def barrier(self) -> None:
        """Return once every process has called this."""
        self.all_gather_object(None)

    @cached_property
    def _state(self) -> _Collectives:
        return _Collectives(self._device, self._group)


@cache  # a group and its connections last as long as the process
def _group(size: int) -> Any:
    """Return torch's group of `size` consecutive processes that has this one, for tensors on the CPU."""
    import torch.distributed as distributed

    join()
    return distributed.new_subgroups(size, backend="gloo", timeout=TIMEOUT)[0]


_MESSAGE_NUMBERS = 2**24
"""Most numbers per message, unless one tensor has more: a copy of all gradients would need a model's memory."""


def _messages(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors in their order, split where the dtype changes or a message is full."""
    messages: list[list[Tensor]] = []
    free = 0
    for tensor in tensors:
        if not messages or messages[-1][0].dtype != tensor.dtype or tensor.numel() > free:
            messages.append([])
            free = _MESSAGE_NUMBERS
        messages[-1].append(tensor)
        free -= tensor.numel()
    return messages


class _Collectives:
    """torch's collectives: messages over gloo on the CPU, tensors on their device, with NCCL on a GPU."""

    def __init__(self, device: torch.device | None, group: Any = None) -> None:
        import torch
        from accelerate import PartialState

        join()
        self._group = group
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
            torch.distributed.all_reduce(there, group=self._group)
            if there.is_cuda:  # NCCL returns at once; waiting later would not count as waiting for the others
                torch.cuda.current_stream(there.device).synchronize()
        return there.to(flat.device)

    def exchange(self, message: bytes, count: int) -> list[bytes]:
        """Every process's message, in order of rank; there are `count` processes."""
        import torch
        import torch.distributed

        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(count)]
        with waiting():
            torch.distributed.all_gather(sizes, torch.tensor([len(message)]), group=self._group)
        padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
        padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        found = [torch.zeros_like(padded) for _ in range(count)]
        with waiting():
            torch.distributed.all_gather(found, padded, group=self._group)
        return [row[: int(size)].numpy().tobytes() for row, size in zip(found, sizes, strict=True)]


def join_launched() -> None:
    """Join the processes that an external launcher started, if one did, so that none waits for one that never came.

    Raises:
        UsageError: see `rendezvous.meet`.
    """
    if world_size() > 1 and LISTENER not in os.environ and not is_joined():
        join()


def join() -> None:
    """Initialize torch's process group once: gloo for tensors on the CPU, NCCL for those on a GPU.

    Raises:
        UsageError: see `rendezvous.meet`.
    """
    if is_joined():
        return
    listener = os.environ.pop(LISTENER, None)
    if listener is None:
        meet(_initialize)
        return
    import torch.distributed as distributed

    index = rank()
    store = distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]  (documented, not listed)
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size(),
        is_master=index == 0,
        timeout=TIMEOUT,
        master_listen_fd=int(listener) if index == 0 else None,
    )
    _initialize(store)


def _initialize(store: Store) -> None:
    import torch
    import torch.distributed as distributed

    # Windows and custom builds have GPUs without NCCL; gloo then also sends tensors of the GPU.
    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=TIMEOUT)


def leave() -> None:
    """Destroy the process group, if there is one, at the end of a successful run.

    Otherwise torch's threads may still wait for a process that has ended when the interpreter exits, and abort.
    """
    if is_joined():
        sys.modules["torch.distributed"].destroy_process_group()


def exit_without_teardown(code: int) -> NoReturn:
    """End this process at once with `code`, its output flushed, its process group left as it is.

    The other processes may have ended: torch's threads then wait for them, or abort while the interpreter destroys
    them, and the exit code would be that of the abort.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed by the reader
            stream.flush()
    os._exit(code)


def is_joined() -> bool:
    """Whether this process is in an initialized process group; False without importing torch where nothing has."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


_LOST_PEER_ERRORS = {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}
_LOST_PEER_MESSAGES = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
_MAX_CAUSES = 20


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether an error only reports the end of another process, which then has the actual cause."""
    seen = 0
    while error is not None and seen < _MAX_CAUSES:
        if {kind.__name__ for kind in type(error).__mro__} & _LOST_PEER_ERRORS:
            return True
        if isinstance(error, RuntimeError) and any(message in str(error) for message in _LOST_PEER_MESSAGES):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
