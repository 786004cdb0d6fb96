"""An HTTP endpoint as a reward: prompts and answers go out as JSON, one number each comes back (docs/rewards.md).

The server is trusted with the texts and with nothing else: its answer is bounded in size and time, redirects are not
followed, what it writes is cleaned before a person sees it, and the token is in no message.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

import httpx2

from rlhf_cli import __version__
from rlhf_cli.data.records import Prompt, prompt_to_json
from rlhf_cli.errors import DataError, Interrupted, UsageError
from rlhf_cli.progress import printable, warn
from rlhf_cli.rewards.checks import numbers
from rlhf_cli.rewards.contract import Stop
from rlhf_cli.rewards.endpoint import check_endpoint, is_loopback, network_error, retry_after, without_query
from rlhf_cli.watchdog import beat

VERSION = 1
"""Of the form of a request."""

_AT_ONCE = 4
_FIRST_WAIT = 0.5
_LONGEST_BACKOFF = 30.0
_LONGEST_WAIT = 600.0
_POLL = 0.2
_EXCERPT = 200
_BYTES, _BYTES_AN_ANSWER = 1 << 20, 1 << 10


class _MayPass(Exception):  # noqa: N818  (never leaves this module)
    """An attempt failed in a way that another may not."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


@dataclass(frozen=True)
class _Round:
    """What the requests of one call have in common."""

    client: httpx2.AsyncClient
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))
    told: asyncio.Event = field(default_factory=asyncio.Event)


class HTTPReward:
    """A `Reward` behind a URL.

    Args:
        url: where to POST.
        token_env: environment variable that holds a bearer token; None sends none.
        timeout: seconds for one whole attempt: finding the host, connecting, sending and every byte of the answer.
        retries: further attempts at a request that failed to connect, took too long, or was answered 429 or 5xx.
        request_size: answers in one request; four requests are under way at once.
        first_wait: seconds before the first further attempt; doubled before each one after it, up to 30, and cut
            by a random share of up to a half, so that many clients do not come back at once.
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
        first_wait: float = _FIRST_WAIT,
        stop: Stop | None = None,
    ) -> None:
        self._url, self._shown = url, without_query(url)
        self._token = check_endpoint(url, token_env)
        self._timeout, self._retries, self._request_size = timeout, retries, request_size
        self._first_wait, self._stop = first_wait, stop
        self._random = random.Random()  # of its own: waiting must not move the dice that training throws
        if self._token and url.lower().startswith("http:") and not is_loopback(url):
            warn(f"the token in {token_env} is sent to {self._shown} unencrypted; use https")

    @property
    def name(self) -> str:
        """Host and port."""
        return httpx2.URL(self._url).netloc.decode("ascii")

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
        async with self._client() as client:
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

    def _client(self) -> httpx2.AsyncClient:
        """A new one for every call: connections that idle between steps are what servers and firewalls drop."""
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # a compressed answer has no bound
            "Content-Type": "application/json",
            "User-Agent": f"rlhf-cli/{__version__}",
        }
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            # What a proxy calls localhost is another machine.
            return httpx2.AsyncClient(
                headers=headers,
                timeout=None,  # an attempt has one deadline; those of the client begin anew with every byte
                follow_redirects=False,
                trust_env=not is_loopback(self._url),
            )
        except (ImportError, ValueError, httpx2.InvalidURL) as error:  # a proxy of an unknown kind
            raise UsageError(
                f"{self._shown} cannot be asked: the proxy that the environment names cannot be used",
                hint="see HTTP_PROXY, HTTPS_PROXY and ALL_PROXY; NO_PROXY excepts a host",
            ) from error

    async def _ask(self, round_: _Round, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """The rewards of one request."""
        request = {
            "version": VERSION,
            "prompts": [prompt_to_json(prompt) for prompt in prompts],
            "completions": list(completions),
        }
        body = json.dumps(request).encode("ascii")
        try:
            async with round_.slots:
                content = await self._send(round_, body, _BYTES + _BYTES_AN_ANSWER * len(prompts))
            beat()
            return self._rewards(content, prompts, completions)
        except DataError as error:
            raise DataError(self._clean(error.message), hint=error.hint) from error

    async def _send(self, round_: _Round, body: bytes, limit: int) -> bytes:
        """The body of a successful answer, after as many attempts as it takes and is allowed."""
        for attempt in range(self._retries + 1):
            try:
                return await self._attempt(round_.client, body, limit)
            except _MayPass as failure:
                backoff = min(self._first_wait * 2**attempt, _LONGEST_BACKOFF) * self._random.uniform(0.5, 1.0)
                pause = max(backoff, failure.pause or 0.0)
                if attempt == self._retries or pause > _LONGEST_WAIT:
                    raise self._given_up(failure, attempt + 1, pause) from failure
                if not round_.told.is_set():
                    round_.told.set()
                    warn(
                        f"{self._shown}: {self._clean(failure.reason)}; trying again in {pause:.1f} s, "
                        f"at most {self._retries} times"
                    )
                await self._pause(pause)
        raise AssertionError("the last attempt returns or raises")

    async def _pause(self, seconds: float) -> None:
        """Wait, unless a signal came: a scheduler kills what waits for a server longer than for its own patience."""
        end = time.monotonic() + seconds
        while True:
            if self._stop is not None:
                self._stop.check()
            if (left := end - time.monotonic()) <= 0:
                return
            await asyncio.sleep(min(left, _POLL))

    def _given_up(self, failure: _MayPass, attempts: int, pause: float) -> DataError:
        times = "once" if attempts == 1 else f"{attempts} times"
        wants = f", and wants {pause:,.0f} s of patience" if pause > _LONGEST_WAIT else ""
        return DataError(
            f"{self._shown}: {failure.reason} (asked {times}{wants})",
            hint="see that the server runs and is quick enough, then run the same command again: it goes on from the "
            "last checkpoint; `timeout`, `retries` and `request_size` of the reward may be changed for that",
        )

    async def _attempt(self, client: httpx2.AsyncClient, body: bytes, limit: int) -> bytes:
        try:
            async with asyncio.timeout(self._timeout), client.stream("POST", self._url, content=body) as response:
                content, is_whole = await _read(response, limit)
        except (httpx2.TimeoutException, TimeoutError):
            raise _MayPass(f"no answer within {self._timeout:g} s") from None
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            raise DataError(f"{self._shown} cannot be asked: {type(error).__name__}") from error
        except httpx2.TransportError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise DataError(
                    f"{self._shown}: its certificate cannot be verified: {error}",
                    hint="name the authority's certificate by the environment variable SSL_CERT_FILE",
                ) from error
            raise _MayPass(f"{type(error).__name__}: {network_error(error)}") from error
        self._check_status(response, content)
        if not is_whole:
            raise DataError(f"{self._shown} answered with more than {limit:,} bytes")
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise DataError(f"{self._shown} answered in `{encoding}`, which it was not asked for")
        return content

    def _check_status(self, response: httpx2.Response, content: bytes) -> None:
        status = response.status_code
        if 200 <= status < 300:
            return
        try:
            phrase = f" {HTTPStatus(status).phrase.lower()}"
        except ValueError:  # a number nobody has given a meaning
            phrase = ""
        reason = f"answered {status}{phrase}: {_excerpt(content)}"
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= 500:
            raise _MayPass(reason, retry_after(response.headers.get("Retry-After")))
        if 300 <= status < 400:
            where = response.headers.get("Location", "nowhere")
            raise DataError(
                f"{self._shown} answered {status}{phrase}, a redirect to {where}, which is not followed",
                hint="give the final address as `url`",
            )
        hint = "docs/rewards.md says what is sent"
        if status in (401, 403):
            hint = (
                "name the environment variable with the token by `token_env`" if not self._token else "mend the token"
            )
        raise DataError(f"{self._shown} {reason}", hint=hint)

    def _rewards(self, content: bytes, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._shown} answered what is not JSON: {_excerpt(content)}", hint=_FORM) from error
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise DataError(f"{self._shown} answered without a list `rewards`: {_excerpt(content)}", hint=_FORM)
        return numbers(
            self._shown, [math.nan if reward is None else reward for reward in rewards], prompts, completions
        )

    def _clean(self, text: str) -> str:
        """Without the token, should the server have sent it back, and without control characters."""
        if self._token:
            text = text.replace(self._token, "[token]")
        return printable(text)


_FORM = 'an answer is {"rewards": [0.5, ...]}, one number for each completion, in their order'


async def _read(response: httpx2.Response, limit: int) -> tuple[bytes, bool]:
    """The body as it came, up to `limit` bytes, and whether that is all."""
    parts, size = [], 0
    async for part in response.aiter_raw():
        parts.append(part)
        size += len(part)
        if size > limit:
            return b"".join(parts)[:limit], False
    return b"".join(parts), True


def _excerpt(content: bytes) -> str:
    text = " ".join(content[: 16 * _EXCERPT].decode("utf-8", errors="replace").split())
    return (text if len(text) <= _EXCERPT else text[:_EXCERPT] + "...") or "an empty body"
