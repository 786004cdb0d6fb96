"""Group commit: one thread writes everything, and stores many labels with one write to disk.

Requests put calls on a queue. The thread takes all waiting calls, runs them in one transaction, and answers them when
it is on disk. The busier the server, the more labels share one disk write.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import LabelRefusedError

T = TypeVar("T")
_MOST_AT_ONCE = 256


@dataclass
class _Call:
    function: Callable[[LabelSession], Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None


class Writer:
    """Runs calls on a session one after another, for any number of concurrent requests.

    Args:
        session: used by this thread only from now on; `close` closes it.
    """

    def __init__(self, session: LabelSession) -> None:
        self._session = session
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="labels", daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[LabelSession], T]) -> T:
        """Return or raise what `function` does, once its writes are on disk.

        A function may run twice, if its first transaction was rolled back because another call failed.
        """
        loop = asyncio.get_running_loop()
        call = _Call(function, loop, loop.create_future())
        self._queue.put(call)
        return await call.future

    def close(self) -> None:
        """Finish waiting calls and close the session."""
        self._queue.put(None)
        self._thread.join()
        self._session.close()

    def _work(self) -> None:
        is_open = True
        while is_open:
            calls: list[_Call] = []
            waiting = self._queue.get()
            while waiting is not None:
                calls.append(waiting)
                if len(calls) == _MOST_AT_ONCE or self._queue.empty():
                    break
                waiting = self._queue.get()
            is_open = waiting is not None
            if calls:
                self._run_calls(calls)
                _resolve(calls)

    def _run_calls(self, calls: list[_Call]) -> None:
        """Run all calls in one transaction; after an unexpected error, run each in its own."""
        try:
            with self._session.transaction():
                for call in calls:
                    call.result, call.error = None, None
                    try:
                        call.result = call.function(self._session)
                    except LabelRefusedError as error:  # nothing was written for this one
                        call.error = error
        except Exception as error:
            if len(calls) == 1:
                calls[0].error = error  # raised again where the call came from
                return
            for call in calls:
                self._run_calls([call])


def _resolve(calls: list[_Call]) -> None:
    """Wake each event loop once for all its calls."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Call]] = {}
    for call in calls:
        by_loop.setdefault(call.loop, []).append(call)
    for loop, own in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_settle, own)


def _settle(calls: list[_Call]) -> None:
    for call in calls:
        if call.future.cancelled():  # the client has disconnected; its label is stored
            continue
        if call.error is not None:
            call.future.set_exception(call.error)
        else:
            call.future.set_result(call.result)
