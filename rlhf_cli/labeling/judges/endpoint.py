"""Judges behind an OpenAI-compatible endpoint: POST `/chat/completions`, temperature 0, several requests in flight.

Each reply is on disk before the next request is sent, and so is the possible cost of an attempt without a reply. After
a signal, an error or the cost limit, requests in flight may finish, since they are paid for; no new ones are sent.
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx2

from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import CostLimitError, Interrupted
from rlhf_cli.http_client.client import INITIAL_BACKOFF, Hints, JSONClient, RefusedError, UnusableError, excerpt
from rlhf_cli.labeling.judges.budget import Budget, ClosedError, CostReservation, Prices, most_tokens
from rlhf_cli.labeling.judges.questions import Question
from rlhf_cli.labeling.judges.replies import REFUSED, UNHEARD, UNUSABLE, Reply

_ABOUT_THE_TEXT = (400, 413, 422)
"""Status codes for texts that a server refuses, for example because they are too long; others concern the whole run."""
_PATIENCE = 5
"""After this many unusable replies, and no usable one, the endpoint itself is considered broken."""
GRACE = 10.0
"""Seconds for requests in flight to finish after a signal."""
_POLL = 0.1
_BYTES, _BYTES_PER_TOKEN = 1 << 20, 64
_HINTS = Hints(
    unreachable="check that the server runs and is fast enough, then run the same command again: earlier verdicts are "
    "kept; `timeout`, `retries` and `concurrency` of the judge may be changed",
    rejected="`url` is the base URL, such as http://localhost:8000/v1, and `name` the name of the model there; see "
    "docs/judges.md for the request",
)

Keep = Callable[[int, Reply], object]
"""Called with the index of a question and its reply; the reply is on disk when it returns."""


class EndpointJudge:
    """Asks an endpoint.

    Args:
        url: base URL.
        name: of the model at the endpoint.
        budget: shared by all judges.
        prices: per token.
        max_new_tokens: maximum length of a reply.
        concurrency: maximum number of requests in flight.
        token_env: see `JSONClient`.
        timeout: see `JSONClient`.
        retries: see `JSONClient`.
        initial_backoff: see `JSONClient`.
        stop: reports signals.

    Raises:
        UsageError: the URL is invalid, or the environment has no token.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        budget: Budget,
        prices: Prices | None = None,
        max_new_tokens: int = 512,
        concurrency: int = 8,
        token_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        initial_backoff: float = INITIAL_BACKOFF,
        stop: StopRequest | None = None,
    ) -> None:
        self._http = JSONClient(
            url.rstrip("/") + "/chat/completions",
            token_env=token_env,
            timeout=timeout,
            retries=retries,
            hints=_HINTS,
            initial_backoff=initial_backoff,
            stop=stop,
        )
        self._name, self._budget, self._prices = name, budget, prices or Prices()
        self._max_new_tokens, self._concurrency = max_new_tokens, concurrency
        self._timeout, self._stop = timeout, stop
        self._usable = 0
        self._unusable: list[RefusedError | UnusableError] = []
        self._closing = False

    def ask(self, questions: Sequence[Question], keep: Keep, charge: Keep, *, usable: int = 0) -> None:
        """Ask all questions concurrently.

        Args:
            questions: any number.
            keep: see `Keep`; called in the order in which replies arrive.
            charge: called for attempts without a reply that may be billed; they count at their maximum cost, and their
                questions stay open.
            usable: number of usable replies in the cache.

        Raises:
            DataError: the endpoint is unreachable, refuses requests, or returns nothing usable.
            CostLimitError: the next request could exceed the budget.
            Interrupted: a signal arrived. In all three cases replies to requests in flight are kept.
        """
        self._usable, self._unusable, self._closing = usable, [], False
        asyncio.run(self._ask_all(questions, keep, charge))
        if self._unusable and not self._usable:
            raise self._unusable[-1]

    async def _ask_all(self, questions: Sequence[Question], keep: Keep, charge: Keep) -> None:
        settled = asyncio.Condition()
        waiting = iter(enumerate(questions))
        async with self._http.connect() as client:
            workers = {
                asyncio.create_task(self._work(client, waiting, keep, charge, settled))
                for _ in range(min(self._concurrency, len(questions)))
            }
            try:
                await self._watch(workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _watch(self, workers: set[asyncio.Task[None]]) -> None:
        """Wait for all workers; after a failure or a signal, wait for requests in flight only, then raise."""
        pending, error, deadline = workers, None, 0.0
        while pending:
            done, pending = await asyncio.wait(pending, timeout=_POLL, return_when=asyncio.FIRST_EXCEPTION)
            if error is None:
                error = next((found for worker in done if (found := worker.exception()) is not None), None)
                error = error or self._signal()
                self._closing = error is not None
                deadline = time.monotonic() + (self._timeout if isinstance(error, CostLimitError) else GRACE)
            elif time.monotonic() > deadline:
                break
        if error is not None:
            raise error

    def _signal(self) -> Interrupted | None:
        try:
            if self._stop is not None:
                self._stop.check()
        except Interrupted as signal:
            return signal
        return None

    async def _work(
        self,
        client: httpx2.AsyncClient,
        waiting: Iterator[tuple[int, Question]],
        keep: Keep,
        charge: Keep,
        settled: asyncio.Condition,
    ) -> None:
        for position, question in waiting:
            most = self._at_most(question)
            spending = CostReservation(
                self._budget,
                most.cost,
                settled,
                lambda: self._closing,
                functools.partial(charge, position, replace(most, failure=UNHEARD)),
            )
            cost = 0.0
            try:
                reply = await self._reply(client, question, most, spending)
                cost = reply.cost
                keep(position, reply)
                if not self._usable and len(self._unusable) >= _PATIENCE:
                    raise self._unusable[-1]
            except ClosedError:
                return
            finally:
                await spending.settle(cost)

    def _at_most(self, question: Question) -> Reply:
        """Upper bound on the cost of a reply, used if the endpoint reports no usage."""
        prompt_tokens = most_tokens(question.text)
        return Reply(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._max_new_tokens,
            cost=self._prices.cost(prompt_tokens, self._max_new_tokens),
            is_estimated=True,
        )

    async def _reply(
        self, client: httpx2.AsyncClient, question: Question, most: Reply, spending: CostReservation
    ) -> Reply:
        request = {
            "model": self._name,
            "messages": [
                {"role": "system", "content": question.instructions},
                {"role": "user", "content": question.material},
            ],
            "temperature": 0,
            "max_tokens": self._max_new_tokens,
        }
        body = json.dumps(request).encode("ascii")
        try:
            content = await self._http.post(client, body, _BYTES + _BYTES_PER_TOKEN * self._max_new_tokens, spending)
        except RefusedError as error:
            if error.status not in _ABOUT_THE_TEXT:
                raise
            self._unusable.append(error)
            return Reply(failure=REFUSED, text=error.message)
        except UnusableError as error:
            self._unusable.append(error)
            return replace(most, failure=UNUSABLE, text=error.message)
        reply = self._read(content, most)
        if not reply.failure:
            self._usable += 1
            beat()
        return reply

    def _read(self, content: bytes, most: Reply) -> Reply:
        """Parse a response; one without a completion still costs what its `usage` says."""
        try:
            response: Any = json.loads(content)
        except (ValueError, RecursionError):
            response = {}
        reply = self._with_usage(most, response.get("usage") if isinstance(response, dict) else None)
        try:
            choice = response["choices"][0]
            text = choice["message"].get("content")
            is_cut = choice.get("finish_reason") == "length"
        except (KeyError, IndexError, TypeError, AttributeError):
            text, is_cut = 0, False
        if text is not None and not isinstance(text, str):
            said = self._http.clean(f"{self._http.shown} answered without a chat completion: {excerpt(content)}")
            self._unusable.append(UnusableError(said, hint=_HINTS.rejected))
            return replace(reply, failure=UNUSABLE, text=said)
        return replace(reply, text=self._http.without_token(text or ""), is_cut=is_cut)

    def _with_usage(self, most: Reply, usage: Any) -> Reply:
        counted = _usage(usage)
        if counted is None:
            return most
        return replace(
            most,
            prompt_tokens=counted[0],
            completion_tokens=counted[1],
            cost=self._prices.cost(*counted),
            is_estimated=False,
        )


def _usage(usage: Any) -> tuple[int, int] | None:
    """Tokens of prompt and reply, if the endpoint reports plausible numbers."""
    if not isinstance(usage, dict):
        return None
    found = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in found):
        return None
    return found  # pyright: ignore[reportReturnType]
