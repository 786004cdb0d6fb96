"""Completions that a server draws, one HTTP request each, while this process waits or does something else."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.generation.generator import Completion, Generator, Progress, Request, ignore

if TYPE_CHECKING:
    from rlhf_cli.generation.policy import Policy

_CONCURRENT = 256
"""Most requests at a time: the sequences that vLLM runs at a time by default."""
POLL = 0.2
"""Seconds between two looks at a stop request."""


@dataclass(frozen=True)
class Drawn:
    """What a server drew.

    Attributes:
        ids: token ids, including the stop token if there is one.
        logprobs: of each, in nats, in the distribution that it was drawn from; NaN where the server had none.
    """

    ids: list[int]
    logprobs: list[float]


class Draw:
    """Requests on their way; they are sent from when this is made, whether or not anyone waits for them.

    The threads end with the process: a server drops the requests of a client that has gone.

    Args:
        send: sends one request and returns what was drawn; is called from several threads.
        requests: N requests.

    Attributes:
        drawn: N completions, in the order of `requests`; None where there is none yet.
    """

    def __init__(self, send: Callable[[Request], Drawn], requests: Sequence[Request]) -> None:
        self.drawn: list[Drawn | None] = [None] * len(requests)
        self._send, self._requests, self._running = send, requests, len(requests)
        self._waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[tuple[int, Drawn | Exception]] = queue.SimpleQueue()
        for number in range(len(requests)):
            self._waiting.put(number)
        for _ in range(min(len(requests), _CONCURRENT)):
            threading.Thread(target=self._work, name="vllm-request", daemon=True).start()

    def collect(self, progress: Progress = ignore, stop: Callable[[], object] = lambda: None) -> Exception | None:
        """Return once no request is running: the first failure, or None if all were drawn.

        Args:
            progress: is told of each completion.
            stop: called several times a second; may raise, and then requests that wait are not sent.
        """
        failure: Exception | None = None
        try:
            while self._running:
                if failure is not None:
                    self._drop()
                stop()
                with contextlib.suppress(queue.Empty):
                    number, found = self._ended.get(timeout=POLL)
                    self._running -= 1
                    if isinstance(found, Exception):
                        failure = failure or found
                    else:
                        self.drawn[number] = found
                        beat()
                        progress(1, len(found.ids))
        except BaseException:
            self._drop()
            raise
        return failure

    def _work(self) -> None:
        while True:
            try:
                number = self._waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._ended.put((number, self._send(self._requests[number])))
            except Exception as error:  # `collect` returns it
                self._ended.put((number, error))

    def _drop(self) -> None:
        """Take back the requests that no thread has begun."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
                self._running -= 1


@dataclass
class PendingDraw:
    """Completions that are drawn in the meantime.

    Attributes:
        requests: N requests.
        draw: their way; None once it has ended.
        drawn: N completions once it has ended; None if the server was lost.
    """

    requests: Sequence[Request]
    draw: Draw | None
    drawn: list[Drawn] | None = None


@runtime_checkable
class DrawsAhead(Generator, Protocol):
    """A `Generator` that can draw while this process trains: the policy's weights are elsewhere."""

    def begin(self, policy: Policy, requests: Sequence[Request]) -> PendingDraw:
        """Hand the policy's weights over and begin to draw; all processes call this together.

        Where the server is lost meanwhile, `finish` draws.

        Raises:
            ServerLostError: the server did not come back in time.
        """
        ...

    def wait(self, pending: PendingDraw, *, progress: Progress = ignore) -> None:
        """Return once nothing is on its way; `pending.drawn` then has what was drawn."""
        ...

    def finish(
        self, policy: Policy, pending: PendingDraw, *, progress: Progress = ignore
    ) -> tuple[list[Completion], bool]:
        """Return N completions, and whether the weights of `begin` drew them.

        Where a server was lost, in any process, all are drawn again, with the weights that the policy has now.
        """
        ...
