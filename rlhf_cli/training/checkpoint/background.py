"""One checkpoint at a time is written by a thread, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_cli.distributed.agreement import agreed
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.ranks import local_world_size
from rlhf_cli.distributed.watchdog import waiting
from rlhf_cli.memory import free_host_memory
from rlhf_cli.models.sharding import is_divided
from rlhf_cli.progress import detail, warn
from rlhf_cli.training.checkpoint.files import Take
from rlhf_cli.training.checkpoint.snapshot import ShardGroup, Snapshot, copied_bytes, is_part_of

_RESERVE = 1.25
"""A copy is made by default only if so many times its size is free."""


class BackgroundWriter:
    """Writes copies in a thread. All processes of a run make one and call the same methods in the same order.

    An error in the thread is raised by `check` or `wait`, in all processes. A process that ends without `wait` leaves
    what a killed one leaves: the checkpoint before, whole.

    Args:
        processes: of the run.
        is_asked_for: whether to write in the background; None does so if tensors are on a GPU and the machine has
            memory for the copy.

    Attributes:
        is_writing: whether something was begun whose end was not waited for; the same in all processes.
    """

    def __init__(self, processes: ProcessGroup, is_asked_for: bool | None) -> None:
        self._processes, self._is_asked_for = processes, is_asked_for
        self._thread: threading.Thread | None = None
        self.is_writing = False
        self._failure: Exception | None = None
        self._group: ShardGroup | None = None

    def is_used_for(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these tensors are copied, to be written in the background."""
        if self._is_asked_for is None:
            return not self._processes.any(not self._has_memory(tensors))
        return self._is_asked_for

    def _has_memory(self, tensors: Mapping[str, Tensor]) -> bool:
        if not any(tensor.device.type == "cuda" for tensor in tensors.values()):
            return False
        size = copied_bytes(tensors, is_main=self._processes.is_main)
        on_machine = (local_world_size() or 1) if any(map(is_divided, tensors.values())) else 1
        free = free_host_memory()
        if _RESERVE * size * on_machine <= free:
            return True
        detail(
            f"checkpoints are not written in the background: a copy takes {on_machine * size / 1e9:,.1f} GB, and "
            f"{free / 1e9:,.1f} GB of host memory are free"
        )
        return False

    def begin(self, tensors: Mapping[str, Tensor], names: list[str], write: Callable[[Take], None]) -> None:
        """Copy tensors and let the thread of process 0 write them, once what was written before is on the disk.

        Args:
            tensors: name -> tensor, maybe sharded.
            names: in the order in which they are taken.
            write: called in process 0 with what returns a tensor by its name, whole.
        """
        self.wait()
        is_main = self._processes.is_main
        sharded = next((tensor for tensor in tensors.values() if isinstance(tensor, DTensor)), None)
        if sharded is not None and self._group is None:
            self._group = ShardGroup(sharded)
        with torch.no_grad():
            snapshot = Snapshot(tensors, names, self._group, is_main=is_main)

        def written() -> None:
            try:
                write(snapshot.take)
            finally:
                snapshot.finish()  # so that no process waits for this one

        self.is_writing = True
        if is_main or is_part_of(self._group):
            work = written if is_main else snapshot.send
            self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
            self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # raised in the main thread, by `wait`
            self._failure = error

    def check(self) -> None:
        """Raise the error of a write that has failed; a message to all processes only while one is under way."""
        if self.is_writing and not self._processes.any(self._thread is not None and self._thread.is_alive()):
            self.wait()

    def wait(self) -> None:
        """Wait until what was begun is on the disk.

        Raises:
            DiskError: it could not be written; raised in all processes.
        """
        if not self.is_writing:
            return
        self._join()
        failure, self._failure, self.is_writing = self._failure, None, False

        def result() -> None:
            if failure is not None:
                raise failure

        agreed(result, self._processes)

    def finish(self) -> None:
        """Wait in this process alone, because another error ends the run; a failure becomes a warning."""
        self._join()
        if self._failure is not None:
            warn(f"the last checkpoint was not written: {self._failure}")
        self._failure, self.is_writing = None, False

    def _join(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._processes.is_main:
            thread.join()  # which counts as progress with every piece that it writes
        else:
            with waiting():
                thread.join()
