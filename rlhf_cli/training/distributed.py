"""Stop requests and gradients shared by all processes of a run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.errors import Interrupted
from rlhf_cli.models.sharding import local, sum_over_shards


class DistributedStop:
    """A stop request that reached any process, known to all processes.

    Processes see a signal at different moments. A process that stopped alone would leave the others waiting for it, and
    one that saved alone would save a step that the others have not done.

    Args:
        own: this process's own stop request.
        processes: the processes of the run.
    """

    def __init__(self, own: StopRequest, processes: ProcessGroup) -> None:
        self._own, self._processes = own, processes
        self._signum: int | None = None

    @property
    def requested(self) -> bool:
        """Whether any process received a signal; all processes ask at the same place of their loops."""
        if self._processes.count == 1:
            return self._own.requested
        signals = self._processes.all_gather_object(_signal_of(self._own))
        self._signum = next((signum for signum in signals if signum is not None), None)
        return self._signum is not None

    def check(self) -> None:
        """Raise `Interrupted` if `requested` was true when all processes asked, or, in a run of one process, now."""
        if self._processes.count == 1:
            self._own.check()
        elif self._signum is not None:
            raise Interrupted(self._signum)


def _signal_of(stop: StopRequest) -> int | None:
    try:
        stop.check()
    except Interrupted as interrupted:
        return interrupted.signum
    return None


def all_reduce_gradients(weights: Iterable[Tensor], processes: ProcessGroup) -> None:
    """Replace every gradient by its sum over the processes; one that no process has stays None, for the optimizer.

    Args:
        weights: trained weights, in the same order everywhere. A process whose share of a step was empty has no
            gradients. Those of sharded weights are summed already.
        processes: the processes of the run.
    """
    if processes.count == 1:
        return
    known = [weight for weight in weights if not isinstance(weight, DTensor)]
    if not known:
        return
    had = torch.tensor([weight.grad is not None for weight in known], dtype=torch.int32)
    processes.all_reduce([had])
    shared = [weight for weight, count in zip(known, had.tolist(), strict=True) if count]
    for weight in shared:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
    processes.all_reduce([weight.grad for weight in shared if weight.grad is not None])


@torch.no_grad()
def clip_gradients(weights: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a norm, in place, and return the norm that they had.

    Args:
        weights: of which some may be sharded; every process has the whole gradient of the others.
        max_norm: of all gradients together.
    """
    weights = list(weights)
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        return torch.nn.utils.clip_grad_norm_(weights, max_norm)
    own = [local(gradient) for gradient in sharded]
    others = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    squares = sum_over_shards(get_total_norm(own).square(), sharded[0])
    norm = (squares + get_total_norm(others).to(squares.device).square()).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in [*own, *others]:
        gradient.mul_(scale.to(gradient.device))
    return norm
