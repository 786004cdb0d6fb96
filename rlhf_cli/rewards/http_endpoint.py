"""HTTP endpoints as rewards: JSON with prompts and completions out, one number per completion in (docs/rewards.md)."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from rlhf_cli.data.records import Prompt, prompt_to_json
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import DataError, Interrupted
from rlhf_cli.http_client.client import INITIAL_BACKOFF, Hints, JSONClient, excerpt
from rlhf_cli.progress import warn
from rlhf_cli.rewards.base import NO_COLUMNS, Columns, check_known
from rlhf_cli.rewards.validation import numbers
from rlhf_cli.settings.rewards import PPORewardSettings

VERSION = 1
"""Version of the request format."""

_CONCURRENT_REQUESTS = 4
_BASE_BYTES, _BYTES_PER_COMPLETION = 1 << 20, 1 << 10
_HINTS = Hints(
    unreachable="check that the server runs and is fast enough, then run the same command again: it resumes from the "
    "last checkpoint; you may change the reward's `timeout`, `retries` and `request_size`",
    rejected="docs/rewards.md describes the request",
)


@dataclass(frozen=True)
class _Batch:
    """What the requests of one `score` call share."""

    client: httpx2.AsyncClient
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_CONCURRENT_REQUESTS))


class HTTPReward:
    """A `Reward` behind a URL. Four requests run concurrently.

    Args:
        settings: a reward with a `url`.
        initial_backoff: see `JSONClient`.
        stop: ends the wait between attempts; None waits to the end.

    Raises:
        UsageError: the URL is invalid, or the token is not in the environment.
    """

    def __init__(
        self,
        settings: PPORewardSettings,
        *,
        initial_backoff: float = INITIAL_BACKOFF,
        stop: StopRequest | None = None,
    ) -> None:
        assert settings.url is not None
        self._http = JSONClient(
            settings.url,
            token_env=settings.token_env,
            timeout=settings.timeout,
            retries=settings.retries,
            hints=_HINTS,
            initial_backoff=initial_backoff,
            stop=stop,
        )
        self._shown, self._request_size, self._send = self._http.shown, settings.request_size, settings.send

    @property
    def name(self) -> str:
        """Host and port of the endpoint."""
        return self._http.host

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Columns = NO_COLUMNS
    ) -> list[float]:
        """Score completions, see `Reward`; `null` in the response is NaN.

        Raises:
            DataError: the endpoint is unreachable, rejects a request, or does not return one number per completion.
            Interrupted: a stop was requested while the endpoint was unreachable.
        """
        check_known(self._shown, self._send, columns)
        try:
            return asyncio.run(self._ask_all(prompts, completions, columns))
        except Interrupted:
            warn(
                f"{self._shown} was unreachable when the run was stopped: this step has no rewards and cannot be "
                "finished; the run resumes from the last checkpoint"
            )
            raise

    async def _ask_all(self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Columns) -> list[float]:
        size = self._request_size

        def part(start: int) -> Coroutine[Any, Any, list[float]]:
            rows = slice(start, start + size)
            more = {name: list(columns[name][rows]) for name in self._send}
            return self._ask(batch, prompts[rows], completions[rows], more)

        async with self._http.connect() as client:
            batch = _Batch(client)
            tasks = [asyncio.create_task(part(start)) for start in range(0, len(completions), size)]
            try:
                return [score for scores in await asyncio.gather(*tasks) for score in scores]
            finally:
                # The first failure cancels the other requests.
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(
        self, batch: _Batch, prompts: Sequence[Prompt], completions: Sequence[str], more: Columns
    ) -> list[float]:
        """Send one request and return its rewards."""
        request = {
            "version": VERSION,
            "prompts": [prompt_to_json(prompt) for prompt in prompts],
            "completions": list(completions),
            **more,
        }
        body = json.dumps(request, default=str).encode("ascii")
        async with batch.slots:
            limit = _BASE_BYTES + _BYTES_PER_COMPLETION * len(prompts)
            content = await self._http.post(batch.client, body, limit)
        beat()
        try:
            return self._rewards(content, prompts, completions)
        except DataError as error:
            raise DataError(self._http.clean(error.message), hint=error.hint) from error

    def _rewards(self, content: bytes, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        try:
            response = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._shown}: the response is not JSON: {excerpt(content)}", hint=_FORMAT) from error
        rewards = response.get("rewards") if isinstance(response, dict) else None
        if not isinstance(rewards, list):
            raise DataError(f"{self._shown}: the response has no list `rewards`: {excerpt(content)}", hint=_FORMAT)
        return numbers(
            self._shown, [math.nan if reward is None else reward for reward in rewards], prompts, completions
        )


_FORMAT = 'return {"rewards": [0.5, ...]}, one number per completion, in the same order'
