"""An HTTP endpoint as a reward: prompts and answers go out as JSON, one number each comes back (docs/rewards.md)."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx2

from rlhf_cli.data.records import Prompt, prompt_to_json
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import DataError, Interrupted
from rlhf_cli.http_client.client import FIRST_WAIT, Advice, JSONClient, excerpt
from rlhf_cli.progress import warn
from rlhf_cli.rewards.validation import numbers

VERSION = 1
"""Of the form of a request."""

_AT_ONCE = 4
_BYTES, _BYTES_AN_ANSWER = 1 << 20, 1 << 10
_ADVICE = Advice(
    away="see that the server runs and is quick enough, then run the same command again: it goes on from the "
    "last checkpoint; `timeout`, `retries` and `request_size` of the reward may be changed for that",
    refused="docs/rewards.md says what is sent",
)


@dataclass(frozen=True)
class _Round:
    """What the requests of one call have in common."""

    client: httpx2.AsyncClient
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))


class HTTPReward:
    """A `Reward` behind a URL.

    Args:
        url: where to POST.
        token_env: environment variable that holds a bearer token; None sends none.
        timeout: seconds for one whole attempt.
        retries: further attempts at a request, see `JSONClient`.
        request_size: answers in one request; four requests are under way at once.
        first_wait: see `JSONClient`.
        stop: asks for signals while it waits between attempts; None waits to the end.

    Raises:
        UsageError: no usable URL, or no token in the environment.
    """

    def __init__(
        self,
        url: str,
        *,
        token_env: str | None = None,
        timeout: float = 30.0,
        retries: int = 5,
        request_size: int = 64,
        first_wait: float = FIRST_WAIT,
        stop: StopRequest | None = None,
    ) -> None:
        self._http = JSONClient(
            url,
            token_env=token_env,
            timeout=timeout,
            retries=retries,
            advice=_ADVICE,
            first_wait=first_wait,
            stop=stop,
        )
        self._shown, self._request_size = self._http.shown, request_size

    @property
    def name(self) -> str:
        """Host and port."""
        return self._http.host

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """See `Reward`; `null` in the server's answer is NaN.

        Raises:
            DataError: the endpoint cannot be reached, refuses, or answers what is no reward for each answer.
            Interrupted: a signal came while the endpoint was away.
        """
        try:
            return asyncio.run(self._ask_all(prompts, completions))
        except Interrupted:
            warn(
                f"{self._shown} stayed away until the stop: this step has no rewards and cannot be finished; the run "
                "goes on from the last checkpoint"
            )
            raise

    async def _ask_all(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        size = self._request_size
        async with self._http.connect() as client:
            round_ = _Round(client)
            parts = [
                asyncio.create_task(self._ask(round_, prompts[start : start + size], completions[start : start + size]))
                for start in range(0, len(completions), size)
            ]
            try:
                return [score for part in await asyncio.gather(*parts) for score in part]
            finally:
                # The first failure ends all: what is under way is cut off, not waited for.
                for part in parts:
                    part.cancel()
                await asyncio.gather(*parts, return_exceptions=True)

    async def _ask(self, round_: _Round, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """The rewards of one request."""
        request = {
            "version": VERSION,
            "prompts": [prompt_to_json(prompt) for prompt in prompts],
            "completions": list(completions),
        }
        body = json.dumps(request).encode("ascii")
        async with round_.slots:
            content = await self._http.post(round_.client, body, _BYTES + _BYTES_AN_ANSWER * len(prompts))
        beat()
        try:
            return self._rewards(content, prompts, completions)
        except DataError as error:
            raise DataError(self._http.clean(error.message), hint=error.hint) from error

    def _rewards(self, content: bytes, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._shown} answered what is not JSON: {excerpt(content)}", hint=_FORM) from error
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise DataError(f"{self._shown} answered without a list `rewards`: {excerpt(content)}", hint=_FORM)
        return numbers(
            self._shown, [math.nan if reward is None else reward for reward in rewards], prompts, completions
        )


_FORM = 'an answer is {"rewards": [0.5, ...]}, one number for each completion, in their order'
