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

from rlhf_cli.distributed.subgroup import Subgroup, subgroup
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import Interrupted, SharedEngineError
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.vllm_engine import Engine

_STEPS_PER_STOP = 16
"""Steps of an engine after which its processes ask each other whether to stop: a fraction of a second."""


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
    def members(self) -> Subgroup | None:
        """The processes; None if this one is alone. All processes of the run ask for it first at the same time."""
        return None if self.size == 1 else subgroup(self.size)

    def gather(self, requests: Sequence[Request]) -> GroupRequests:
        """Return the requests of all processes of the group; each may have another number of them, or none."""
        if self.members is None:
            return GroupRequests(requests, slice(None))
        plain = self.members.all_gather_object([[list(one.prompt_ids), one.seed] for one in requests])
        first = sum(map(len, plain[: self.members.index]))
        every = [Request(ids, seed) for share in plain for ids, seed in share]
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
        steps, ended, told = 0, 0, 0

        def after_step(count: int) -> None:
            nonlocal steps, ended, told
            beat()
            steps, ended = steps + 1, ended + count
            progress(round(requests.share * ended) - told)
            told = round(requests.share * ended)
            if self.members is None:
                stop()
            elif steps % _STEPS_PER_STOP == 0:
                _agree_on_stop(stop, self.members)

        outputs = engine.run(requests.every, sampling, stop_ids, after_step)
        if self.members is not None:
            _check_equal(outputs, self.members)
        return outputs[requests.own]


def _agree_on_stop(stop: Callable[[], object], members: Subgroup) -> None:
    """Raise `Interrupted` in all processes if `stop` raises it in one, for which the others would wait."""
    signum: int | None = None
    try:
        stop()
    except Interrupted as interrupted:
        signum = interrupted.signum
    for told in members.all_gather_object(signum):
        if told is not None:
            raise Interrupted(told)


def _check_equal(outputs: Sequence[Any], members: Subgroup) -> None:
    """Compare what the processes drew. The parts of the model would belong to different texts from the first difference
    on, and nothing else would show it."""
    text = " ".join(str(token) for one in outputs for token in (*one.token_ids, -1))
    if len(set(members.all_gather_object(zlib.crc32(text.encode())))) > 1:
        raise SharedEngineError(
            f"the {members.count} processes that share an engine drew different tokens from the same random numbers",
            hint="use equal GPUs and please report it, or draw with `--set generation.tensor_parallel_size=1`",
        )
