"""JSON over HTTP with a server that is trusted with texts and with nothing else: rewards and judges ask through it.

Its answers are bounded in size and time, redirects are not followed, what it writes is cleaned before a person sees it,
and the token is in no message. What may pass (no connection, no answer in time, 429, 5xx) is tried again.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx2

from rlhf_cli import __version__
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.http_client.addresses import check_endpoint, is_loopback, network_error, retry_after, without_query
from rlhf_cli.http_client.attempts import Attempts, Uncounted
from rlhf_cli.progress import printable, warn

FIRST_WAIT = 0.5
"""Seconds before the first further attempt."""

_LONGEST_BACKOFF = 30.0
_LONGEST_WAIT = 600.0
_POLL = 0.2
_EXCERPT = 200
_OF_GATEWAYS = (HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT, *range(520, 528))
"""What stands between says it of a server behind it, which may be at work on the request all the same."""


class RefusedError(DataError):
    """The server does not carry out this request (4xx): asking again would not help.

    Args:
        message: see `RLHFError`.
        status: the HTTP status.
        hint: see `RLHFError`.
    """

    def __init__(self, message: str, *, status: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class UnusableError(DataError):
    """The server carried out the request, and what it sent cannot be read."""


class _MayPass(Exception):  # noqa: N818  (never leaves this module)
    """An attempt failed in a way that another may not."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


@dataclass(frozen=True)
class Advice:
    """Hints for people, which differ with what the server is for.

    Attributes:
        away: where it stayed away after all attempts.
        refused: where it refuses a request.
    """

    away: str
    refused: str


class JSONClient:
    """Posts JSON to one address. `connect` gives what `post` needs; it lives for one event loop.

    Args:
        url: where to POST.
        token_env: environment variable that holds a bearer token; None sends none.
        timeout: seconds for one whole attempt: finding the host, connecting, sending and every byte of the answer.
        retries: further attempts at a request that failed to connect, took too long, or was answered 429 or 5xx.
        advice: hints.
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
        token_env: str | None,
        timeout: float,
        retries: int,
        advice: Advice,
        first_wait: float = FIRST_WAIT,
        stop: StopRequest | None = None,
    ) -> None:
        self._url, self.shown = url, without_query(url)
        self._token = check_endpoint(url, token_env)
        self._timeout, self._retries, self._first_wait = timeout, retries, first_wait
        self._advice, self._stop = advice, stop
        self._random = random.Random()  # of its own: waiting must not move the dice that training throws
        self._told = False
        if self._token and url.lower().startswith("http:") and not is_loopback(url):
            warn(f"the token in {token_env} is sent to {self.shown} unencrypted; use https")

    @property
    def host(self) -> str:
        """Host and port."""
        return httpx2.URL(self._url).netloc.decode("ascii")

    def connect(self) -> httpx2.AsyncClient:
        """Connections for a while: those that idle long are what servers and firewalls drop."""
        self._told = False
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
                f"{self.shown} cannot be asked: the proxy that the environment names cannot be used",
                hint="see HTTP_PROXY, HTTPS_PROXY and ALL_PROXY; NO_PROXY excepts a host",
            ) from error

    async def post(
        self, client: httpx2.AsyncClient, body: bytes, limit: int, attempts: Attempts | None = None
    ) -> bytes:
        """The body of a successful answer, after as many attempts as it takes and is allowed.

        Args:
            client: from `connect`.
            body: JSON.
            limit: most bytes of the answer.
            attempts: told of each one.

        Raises:
            RefusedError: an answer of 4xx, but 429.
            UnusableError: an answer of more than `limit` bytes, or in an encoding that was not asked for.
            DataError: the server stayed away, or cannot be asked.
            Interrupted: a signal came while it was away.
        """
        try:
            return await self._send(client, body, limit, attempts or Uncounted())
        except DataError as error:
            error.message = self.clean(error.message)
            error.args = (error.message,)
            raise

    async def _send(self, client: httpx2.AsyncClient, body: bytes, limit: int, attempts: Attempts) -> bytes:
        for attempt in range(self._retries + 1):
            await attempts.begin()
            try:
                return await self._attempt(client, body, limit, attempts)
            except _MayPass as failure:
                backoff = min(self._first_wait * 2**attempt, _LONGEST_BACKOFF) * self._random.uniform(0.5, 1.0)
                pause = max(backoff, failure.pause or 0.0)
                if attempt == self._retries or pause > _LONGEST_WAIT:
                    raise self._given_up(failure, attempt + 1, pause) from failure
                if not self._told:
                    self._told = True
                    warn(
                        f"{self.shown}: {self.clean(failure.reason)}; trying again in {pause:.1f} s, "
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
        return DataError(f"{self.shown}: {failure.reason} (asked {times}{wants})", hint=self._advice.away)

    async def _attempt(self, client: httpx2.AsyncClient, body: bytes, limit: int, attempts: Attempts) -> bytes:
        try:
            response, content, is_whole = await self._exchange(client, body, limit, attempts)
        except (httpx2.TimeoutException, TimeoutError):
            raise _MayPass(f"no answer within {self._timeout:g} s") from None
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            raise DataError(f"{self.shown} cannot be asked: {type(error).__name__}") from error
        except httpx2.TransportError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise DataError(
                    f"{self.shown}: its certificate cannot be verified: {error}",
                    hint="name the authority's certificate by the environment variable SSL_CERT_FILE",
                ) from error
            raise _MayPass(f"{type(error).__name__}: {network_error(error)}") from error
        if response.status_code in _OF_GATEWAYS:
            attempts.lost()
        self._check_status(response, content)
        if not is_whole:
            raise UnusableError(f"{self.shown} answered with more than {limit:,} bytes")
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise UnusableError(f"{self.shown} answered in `{encoding}`, which it was not asked for")
        return content

    async def _exchange(
        self, client: httpx2.AsyncClient, body: bytes, limit: int, attempts: Attempts
    ) -> tuple[httpx2.Response, bytes, bool]:
        """One request, and what came back, up to `limit` bytes, and whether that is all."""
        is_sent = False

        async def watch(event: str, info: dict[str, Any]) -> None:
            nonlocal is_sent
            # A proxy's CONNECT has an empty body, and what it opens is no request yet.
            is_post = getattr(info.get("request"), "method", None) == b"POST"
            is_sent = is_sent or (is_post and event.endswith("send_request_body.started"))

        request = client.stream("POST", self._url, content=body, extensions={"trace": watch})
        try:
            async with asyncio.timeout(self._timeout), request as response:
                return response, *await _read(response, limit)
        except BaseException:  # being cancelled, too: the server may be at work on it
            if is_sent:
                attempts.lost()
            raise

    def _check_status(self, response: httpx2.Response, content: bytes) -> None:
        status = response.status_code
        if 200 <= status < 300:
            return
        try:
            phrase = f" {HTTPStatus(status).phrase.lower()}"
        except ValueError:  # a number nobody has given a meaning
            phrase = ""
        reason = f"answered {status}{phrase}: {excerpt(content)}"
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= 500:
            raise _MayPass(reason, retry_after(response.headers.get("Retry-After")))
        if 300 <= status < 400:
            where = response.headers.get("Location", "nowhere")
            raise DataError(
                f"{self.shown} answered {status}{phrase}, a redirect to {where}, which is not followed",
                hint="give the final address as `url`",
            )
        hint = self._advice.refused
        if status in (401, 403):
            hint = (
                "name the environment variable with the token by `token_env`" if not self._token else "mend the token"
            )
        raise RefusedError(f"{self.shown} {reason}", status=status, hint=hint)

    def clean(self, text: str) -> str:
        """Without the token, should the server have sent it back, and without control characters."""
        return printable(self.without_token(text))

    def without_token(self, text: str) -> str:
        """Without the token alone, for what goes into files."""
        return text.replace(self._token, "[token]") if self._token else text


async def _read(response: httpx2.Response, limit: int) -> tuple[bytes, bool]:
    """The body as it came, up to `limit` bytes, and whether that is all."""
    parts, size = [], 0
    async for part in response.aiter_raw():
        parts.append(part)
        size += len(part)
        if size > limit:
            return b"".join(parts)[:limit], False
    return b"".join(parts), True


def excerpt(content: bytes) -> str:
    """The beginning of a body, for messages."""
    text = " ".join(content[: 16 * _EXCERPT].decode("utf-8", errors="replace").split())
    return (text if len(text) <= _EXCERPT else text[:_EXCERPT] + "...") or "an empty body"
