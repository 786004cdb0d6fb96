"""The processes that share one vLLM engine (`generation.tensor_parallel_size`) and draw their requests together.

vLLM divides the model among them, and has a scheduler in each. All schedulers decide alike as long as they are given
the same. So every process of the group adds the requests of all to its engine, in the same order, takes the same
number of steps, and stops after the same one. Each then keeps the completions of its own requests.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import Interrupted, SharedEngineError
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.vllm_engine import Engine

_STEPS_PER_MESSAGE = 16
"""Steps of an engine after which its processes compare what they drew and ask each other whether to stop: a fraction of
a second."""


@dataclass(frozen=True)
class GroupRequests:
    """What an engine draws.

    Attributes:
        every: requests of all processes of the group, in order of rank.
        own: where those of this process are.
    """

    every: Sequence[Request]
    own: slice

    @property
    def share(self) -> float:
        """Share of the requests that are of this process."""
        return len(self.every[self.own]) / max(1, len(self.every))


class EngineGroup:
    """The processes that share an engine with this one; all of them call the same methods in the same order.

    Args:
        size: of the group; 1 is this process alone, which exchanges nothing.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    @cached_property
    def members(self) -> ProcessGroup | None:
        """The processes; None if this one is alone. All processes of the run ask for it first at the same time."""
        return None if self.size == 1 else ProcessGroup(size=self.size)

    def gather(self, requests: Sequence[Request], stop: Callable[[], object] = lambda: None) -> GroupRequests:
        """Return the requests of all processes of the group.

        Args:
            requests: of this process; each may have another number of them, or none.
            stop: as in `draw`; not called by a process that is alone.
        """
        if self.members is None:
            return GroupRequests(requests, slice(None))
        told = self.members.all_gather_object([_signal(stop), [[list(one.prompt_ids), one.seed] for one in requests]])
        _interrupt([signum for signum, _ in told])
        shares = [share for _, share in told]
        first = sum(map(len, shares[: self.members.index]))
        every = [Request(ids, seed) for share in shares for ids, seed in share]
        return GroupRequests(every, slice(first, first + len(requests)))

    def draw(
        self,
        engine: Engine,
        requests: GroupRequests,
        sampling: Sampling,
        stop_ids: Iterable[int],
        *,
        progress: Callable[[int], object] = lambda count: None,
        stop: Callable[[], object] = lambda: None,
    ) -> list[Any]:
        """Draw one completion per request; returns vLLM's `CompletionOutput` of this process's own, in their order.

        Args:
            engine: of this process.
            requests: what `gather` returned.
            sampling: the same in all processes.
            stop_ids: likewise.
            progress: called with the number of own completions that ended. Of a shared engine that is a share of all
                that ended.
            stop: see `Generator.generate`. What it raises in one process of the group is raised in all of them.

        Raises:
            SharedEngineError: the processes drew different tokens.
        """
        steps, ended, told, checksum = 0, 0, 0, 0

        def after_step(finished: Sequence[Any]) -> None:
            nonlocal steps, ended, told, checksum
            beat()
            steps, ended = steps + 1, ended + len(finished)
            checksum = _checksum(finished, checksum)
            progress(round(requests.share * ended) - told)
            told = round(requests.share * ended)
            if self.members is None:
                stop()
            elif steps % _STEPS_PER_MESSAGE == 0:
                _compare(_signal(stop), [steps, ended, checksum], self.members)

        outputs = engine.run(requests.every, sampling, stop_ids, after_step)
        if self.members is not None:
            _compare(None, [steps, ended, checksum], self.members)
        return outputs[requests.own]


def _signal(stop: Callable[[], object]) -> int | None:
    """Return the signal for which `stop` raises `Interrupted`; None if it does not."""
    try:
        stop()
    except Interrupted as interrupted:
        return interrupted.signum
    return None


def _checksum(outputs: Sequence[Any], start: int) -> int:
    """Return a checksum of the tokens of completions that ended, and of those before, whose checksum is `start`."""
    text = "".join(f"{list(one.outputs[0].token_ids)}" for one in outputs)
    return zlib.crc32(text.encode(), start)


def _compare(signum: int | None, state: list[int], members: ProcessGroup) -> None:
    """Compare how far the processes of an engine are, and raise `Interrupted` in all of them if one has a signal.

    The parts of the model would belong to different texts from the first difference on, and nothing else would show it.
    After a difference, schedulers may take different numbers of steps. So all messages while an engine draws are alike,
    and one process may be in the middle while another is at the end.
    """
    told = members.all_gather_object([signum, state])
    if any(other != state for _, other in told):
        raise SharedEngineError(
            f"the {members.count} processes that share an engine drew different tokens from the same random numbers",
            hint="use equal GPUs and please report it, or draw with `--set generation.tensor_parallel_size=1`",
        )
    _interrupt([sent for sent, _ in told])


def _interrupt(signals: Sequence[int | None]) -> None:
    """Raise `Interrupted` if a process has a signal: the others would wait for it."""
    for signum in signals:
        if signum is not None:
            raise Interrupted(signum)
