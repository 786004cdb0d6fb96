"""A judge behind an OpenAI-compatible endpoint: POST `/chat/completions`, temperature 0, several requests in flight.

Each reply is on the disk before the next request takes its place. A signal, an error or the cost limit lets what is
under way finish, since it is paid for, and starts nothing new.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx2

from rlhf_cli.errors import CostLimitError, Interrupted
from rlhf_cli.labeling.judges.budget import Budget, Prices, most_tokens
from rlhf_cli.labeling.judges.questions import Question
from rlhf_cli.labeling.judges.replies import REFUSED, UNUSABLE, Reply
from rlhf_cli.rewards.client import FIRST_WAIT, Advice, JSONClient, RefusedError, UnusableError, excerpt
from rlhf_cli.rewards.contract import Stop
from rlhf_cli.watchdog import beat

_ABOUT_THE_TEXT = (400, 413, 422)
"""What servers answer to a text that is too long or that they do not like; other refusals are about the whole run."""
_PATIENCE = 5
"""Replies that cannot be used, before any that can, after which something is wrong with the endpoint itself."""
_GRACE = 10.0
"""Seconds that requests under way get after a signal."""
_POLL = 0.1
_BYTES, _BYTES_A_TOKEN = 1 << 20, 64
_ADVICE = Advice(
    away="see that the server runs and is quick enough, then run the same command again: verdicts so far are kept; "
    "`timeout`, `retries` and `concurrency` of the judge may be changed for that",
    refused="`url` is the base address, such as http://localhost:8000/v1, and `name` what it calls its model; "
    "docs/judges.md says what is sent",
)

Keep = Callable[[int, Reply], object]
"""Called with the number of a question and its reply, which is safe when this returns."""


class EndpointJudge:
    """Asks an endpoint.

    Args:
        url: base address.
        name: of the model, to the endpoint.
        budget: what may be spent.
        prices: of its tokens.
        max_new_tokens: longest reply.
        concurrency: requests in flight at once.
        token_env: see `JSONClient`.
        timeout: see `JSONClient`.
        retries: see `JSONClient`.
        first_wait: see `JSONClient`.
        stop: asks for signals.

    Raises:
        UsageError: no usable URL, or no token in the environment.
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
        first_wait: float = FIRST_WAIT,
        stop: Stop | None = None,
    ) -> None:
        self._http = JSONClient(
            url.rstrip("/") + "/chat/completions",
            token_env=token_env,
            timeout=timeout,
            retries=retries,
            advice=_ADVICE,
            first_wait=first_wait,
            stop=stop,
        )
        self._name, self._budget, self._prices = name, budget, prices or Prices()
        self._max_new_tokens, self._concurrency = max_new_tokens, concurrency
        self._timeout, self._stop = timeout, stop
        self._usable = 0
        self._unusable: list[RefusedError | UnusableError] = []
        self._closing = False

    def ask(self, questions: Sequence[Question], keep: Keep, *, usable: int = 0) -> None:
        """Ask all questions.

        Args:
            questions: any number.
            keep: see `Keep`; called in the order in which replies come.
            usable: replies that it gave before.

        Raises:
            DataError: the endpoint stays away, refuses, or gives nothing that can be used.
            CostLimitError: the next request could exceed the budget.
            Interrupted: a signal came. In all three cases, replies to what was under way are kept.
        """
        self._usable, self._unusable, self._closing = usable, [], False
        asyncio.run(self._ask_all(questions, keep))
        if self._unusable and not self._usable:
            raise self._unusable[-1]

    async def _ask_all(self, questions: Sequence[Question], keep: Keep) -> None:
        settled = asyncio.Condition()
        waiting = iter(enumerate(questions))
        async with self._http.connect() as client:
            workers = {
                asyncio.create_task(self._work(client, waiting, keep, settled))
                for _ in range(min(self._concurrency, len(questions)))
            }
            try:
                await self._watch(workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _watch(self, workers: set[asyncio.Task[None]]) -> None:
        """Wait for all; after a failure or a signal, only for what is under way, and raise it then."""
        pending, error, deadline = workers, None, 0.0
        while pending:
            done, pending = await asyncio.wait(pending, timeout=_POLL, return_when=asyncio.FIRST_EXCEPTION)
            if error is None:
                error = next((found for worker in done if (found := worker.exception()) is not None), None)
                error = error or self._signal()
                self._closing = error is not None
                deadline = time.monotonic() + (self._timeout if isinstance(error, CostLimitError) else _GRACE)
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
        settled: asyncio.Condition,
    ) -> None:
        for place, question in waiting:
            prompt_tokens = most_tokens(question.text)
            most = self._prices.cost(prompt_tokens, self._max_new_tokens)
            async with settled:
                while not self._closing and not self._budget.fits(most):
                    if not self._budget.is_waiting:
                        raise self._budget.exceeded(most)
                    await settled.wait()
                if self._closing:
                    return
                self._budget.reserve(most)
            cost = 0.0
            try:
                reply = await self._reply(client, question, prompt_tokens)
                cost = reply.cost
                keep(place, reply)
            finally:
                async with settled:
                    self._budget.settle(most, cost)
                    settled.notify_all()

    async def _reply(self, client: httpx2.AsyncClient, question: Question, prompt_tokens: int) -> Reply:
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
            content = await self._http.post(client, body, _BYTES + _BYTES_A_TOKEN * self._max_new_tokens)
            reply = self._read(content, prompt_tokens)
        except RefusedError as error:
            if error.status not in _ABOUT_THE_TEXT:
                raise
            return self._cannot_be_used(REFUSED, error)
        except UnusableError as error:
            return self._cannot_be_used(UNUSABLE, error)
        self._usable += 1
        beat()
        return reply

    def _cannot_be_used(self, failure: str, error: RefusedError | UnusableError) -> Reply:
        self._unusable.append(error)
        if not self._usable and len(self._unusable) >= _PATIENCE:
            raise error
        return Reply(failure=failure, text=error.message)

    def _read(self, content: bytes, prompt_tokens: int) -> Reply:
        try:
            response = json.loads(content)
            choice = response["choices"][0]
            text = choice["message"].get("content")
        except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
            text, choice, response = 0, {}, {}
        if text is not None and not isinstance(text, str):
            raise UnusableError(
                self._http.clean(f"{self._http.shown} answered without a chat completion: {excerpt(content)}"),
                hint=_ADVICE.refused,
            )
        usage = _usage(response.get("usage"))
        given, written = usage or (prompt_tokens, self._max_new_tokens)
        return Reply(
            text=self._http.without_token(text or ""),
            prompt_tokens=given,
            completion_tokens=written,
            cost=self._prices.cost(given, written),
            is_estimated=usage is None,
            is_cut=choice.get("finish_reason") == "length",
        )


def _usage(usage: Any) -> tuple[int, int] | None:
    """Tokens of prompt and reply, if the endpoint says so in numbers that can be."""
    if not isinstance(usage, dict):
        return None
    found = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in found):
        return None
    return found  # pyright: ignore[reportReturnType]
