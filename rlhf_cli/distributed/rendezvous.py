"""How the processes of a run find one another: torch's process group, without a port that anyone could take first.

Under `rlhf --processes` the supervisor opens the listening socket and hands it to rank 0. Other launchers (torchrun,
`accelerate launch`) name an address and a port in the environment, as torch expects.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

LISTENER = "RLHF_LISTENER"
"""Environment variable with the number of the open socket that rank 0 listens on."""

# One process may prepare for hours (hashing, reading data, calling a judge) while the others wait: what ends a wait for
# a process that died is the launcher, not a limit of time.
_PATIENCE = timedelta(days=30)


def join() -> None:
    """Enter the process group, once; tensors on the CPU travel by gloo, those on a GPU by NCCL."""
    import torch
    import torch.distributed as distributed

    if distributed.is_initialized():
        return
    # A GPU can be had without NCCL (Windows, builds of one's own); gloo then carries its tensors too.
    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    listener = os.environ.pop(LISTENER, None)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if listener is None:
        distributed.init_process_group(backend, timeout=_PATIENCE)
        return
    store = distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]  (documented, not listed)
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        count,
        is_master=rank == 0,
        timeout=_PATIENCE,
        master_listen_fd=int(listener) if rank == 0 else None,
    )
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_PATIENCE)


def leave() -> None:
    """Leave the process group, if this process is in one, at the end of a run that went well.

    Left to the interpreter's end, torch's threads may still be waiting for another process that has gone, and abort.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether an error only says that another process has gone: the news is in that one, not here."""
    seen = 0
    while error is not None and seen < _DEEPEST:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}:
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


_DEEPEST = 20
_SIGNS = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
