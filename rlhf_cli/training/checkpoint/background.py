"""One checkpoint at a time is written by a thread, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_cli.distributed.agreement import agreed
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.watchdog import waiting
from rlhf_cli.errors import DiskError, HostMemoryError
from rlhf_cli.memory import is_out_of_memory, trim_memory
from rlhf_cli.progress import say, warn
from rlhf_cli.training.checkpoint.files import Take
from rlhf_cli.training.checkpoint.snapshot import Snapshot, is_part_of, shard_group


class BackgroundWriter:
    """Writes copies in a thread. All processes of a run make one and call the same methods in the same order.

    An error in the thread is raised by `check` or `wait`, in all processes. A process that ends without `wait` leaves
    what a killed one leaves: the checkpoint before, whole.

    Args:
        processes: of the run.

    Attributes:
        is_writing: whether something was begun whose end was not waited for; the same in all processes.
    """

    def __init__(self, processes: ProcessGroup) -> None:
        self._processes = processes
        self._thread: threading.Thread | None = None
        self.is_writing = False
        self._failure: Exception | None = None

    def begin(self, tensors: Mapping[str, Tensor], names: list[str], write: Callable[[Take], None]) -> None:
        """Copy tensors and let the thread of process 0 write them, once what was written before is on the disk.

        Args:
            tensors: name -> tensor, maybe sharded.
            names: in the order in which they are taken.
            write: called in process 0 with what returns a tensor by its name, whole.

        Raises:
            DiskError: what was written before failed; raised in all processes.
            HostMemoryError: a process has no memory for the copy; likewise.
        """
        self.wait()
        is_main = self._processes.is_main
        sharded = next((tensor for tensor in tensors.values() if isinstance(tensor, DTensor)), None)
        group = None if sharded is None else shard_group(sharded)
        snapshot = Snapshot(tensors, names, group, is_main=is_main)
        agreed(lambda: _copy(snapshot), self._processes)

        def written() -> None:
            try:
                write(snapshot.take)
            finally:
                snapshot.finish()  # so that no process waits for this one

        self.is_writing = True
        if is_main or is_part_of(group):
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
        if self._failure is not None and not isinstance(self._failure, DiskError):
            failure, self._failure = self._failure, None
            raise failure  # in this process alone, since threads of others may wait for its parts
        if self.is_writing and not self._processes.any(self._thread is not None and self._thread.is_alive()):
            self.wait()

    def wait(self, *, says: bool = False) -> None:
        """Wait until what was begun is on the disk.

        Args:
            says: tell the user that the run ends only then.

        Raises:
            DiskError: it could not be written; raised in all processes.
        """
        if not self.is_writing:
            return
        self._join(says=says)
        failure, self._failure, self.is_writing = self._failure, None, False

        def result() -> None:
            if failure is not None:
                raise failure

        agreed(result, self._processes)

    def finish(self) -> None:
        """Wait in this process alone, because another error ends the run; a failure becomes a warning."""
        self._join(says=True)
        if self._failure is not None:
            warn(f"the last checkpoint was not written: {self._failure}")
        self._failure, self.is_writing = None, False

    def _join(self, *, says: bool) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if says and thread.is_alive() and self._processes.is_main:
            say("waiting for the checkpoint that is being written")
        if self._processes.is_main:
            thread.join()  # which counts as progress with every piece that it writes
        else:
            with waiting():
                thread.join()
        trim_memory()  # of the copy


def _copy(snapshot: Snapshot) -> None:
    try:
        snapshot.copy()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise HostMemoryError(
            "there is no host memory for the copy from which a checkpoint is written in the background",
            hint="run the same command again with `--set checkpoint_async=false`; the checkpoint before is intact",
        ) from error
