"""JSON over HTTP for rewards and judges. The server is trusted with texts and nothing else.

Responses are limited in size and time, redirects are not followed, text from the server is cleaned before it is shown,
and no message contains the token. Temporary failures (no connection, timeout, 429, 5xx) are retried.
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
"""Seconds before the first retry."""

_LONGEST_BACKOFF = 30.0
_LONGEST_WAIT = 600.0
_POLL = 0.2
_EXCERPT = 200
_GATEWAY_STATUSES = (HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT, *range(520, 528))
"""Status codes that a gateway sends about the server behind it, which may still be handling the request."""


class RefusedError(DataError):
    """The server refused this request (4xx); a retry would not help.

    Args:
        message: see `RLHFError`.
        status: the HTTP status.
        hint: see `RLHFError`.
    """

    def __init__(self, message: str, *, status: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class UnusableError(DataError):
    """The server handled the request, but its response cannot be read."""


class _TemporaryError(Exception):
    """An attempt failed temporarily."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


@dataclass(frozen=True)
class Advice:
    """Hints of error messages, which depend on what the server is for.

    Attributes:
        away: if all attempts failed.
        refused: if the server refuses a request.
    """

    away: str
    refused: str


class JSONClient:
    """Posts JSON to one address. `connect` opens the client that `post` needs; it belongs to one event loop.

    Args:
        url: address of the POST requests.
        token_env: environment variable that holds a bearer token; None sends none.
        timeout: seconds for one whole attempt: resolving the host, connecting, sending, and reading the response.
        retries: most retries of a request that failed to connect, timed out, or got 429 or 5xx.
        advice: hints.
        first_wait: seconds before the first retry; doubled before each further one, up to 30, and reduced by a
            random share of up to a half, so that many clients do not retry at once.
        stop: checked while it waits between attempts; None never stops early.

    Raises:
        UsageError: the URL is unusable, or the token is missing from the environment.
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
        self._random = random.Random()  # its own generator: retries must not change the random numbers of training
        self._told = False
        if self._token and url.lower().startswith("http:") and not is_loopback(url):
            warn(f"the token in {token_env} is sent to {self.shown} unencrypted; use https")

    @property
    def host(self) -> str:
        """Host and port."""
        return httpx2.URL(self._url).netloc.decode("ascii")

    def connect(self) -> httpx2.AsyncClient:
        """Open a client for one batch of requests: servers and firewalls drop connections that idle long."""
        self._told = False
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # the size of a compressed response has no bound
            "Content-Type": "application/json",
            "User-Agent": f"rlhf-cli/{__version__}",
        }
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            # localhost means another machine to a proxy.
            return httpx2.AsyncClient(
                headers=headers,
                timeout=None,  # one deadline per attempt; the client's own timeouts restart with every byte
                follow_redirects=False,
                trust_env=not is_loopback(self._url),
            )
        except (ImportError, ValueError, httpx2.InvalidURL) as error:  # a proxy of an unknown kind
            raise UsageError(
                f"{self.shown}: the proxy in the environment cannot be used",
                hint="check HTTP_PROXY, HTTPS_PROXY and ALL_PROXY; NO_PROXY excludes a host",
            ) from error

    async def post(
        self, client: httpx2.AsyncClient, body: bytes, limit: int, attempts: Attempts | None = None
    ) -> bytes:
        """Return the body of a successful response, after retries if they are needed.

        Args:
            client: from `connect`.
            body: JSON.
            limit: most bytes of the response.
            attempts: receives each attempt.

        Raises:
            RefusedError: a response with 4xx, except 429.
            UnusableError: a response of more than `limit` bytes, or in an unrequested encoding.
            DataError: all attempts failed, or the request cannot be sent.
            Interrupted: a signal came during a wait.
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
            except _TemporaryError as failure:
                backoff = min(self._first_wait * 2**attempt, _LONGEST_BACKOFF) * self._random.uniform(0.5, 1.0)
                pause = max(backoff, failure.pause or 0.0)
                if attempt == self._retries or pause > _LONGEST_WAIT:
                    raise self._given_up(failure, attempt + 1, pause) from failure
                if not self._told:
                    self._told = True
                    warn(
                        f"{self.shown}: {self.clean(failure.reason)}; retrying in {pause:.1f} s, "
                        f"at most {self._retries} times"
                    )
                await self._pause(pause)
        raise AssertionError("the last attempt returns or raises")

    async def _pause(self, seconds: float) -> None:
        """Wait, but stop on a signal: a scheduler kills a process that does not end in time."""
        end = time.monotonic() + seconds
        while True:
            if self._stop is not None:
                self._stop.check()
            if (left := end - time.monotonic()) <= 0:
                return
            await asyncio.sleep(min(left, _POLL))

    def _given_up(self, failure: _TemporaryError, attempts: int, pause: float) -> DataError:
        times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        wants = f"; it asks to wait {pause:,.0f} s" if pause > _LONGEST_WAIT else ""
        return DataError(f"{self.shown}: {failure.reason} ({times}{wants})", hint=self._advice.away)

    async def _attempt(self, client: httpx2.AsyncClient, body: bytes, limit: int, attempts: Attempts) -> bytes:
        try:
            response, content, is_whole = await self._exchange(client, body, limit, attempts)
        except (httpx2.TimeoutException, TimeoutError):
            raise _TemporaryError(f"no response within {self._timeout:g} s") from None
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            raise DataError(f"{self.shown}: the request cannot be sent: {type(error).__name__}") from error
        except httpx2.TransportError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise DataError(
                    f"{self.shown}: its certificate cannot be verified: {error}",
                    hint="set the environment variable SSL_CERT_FILE to the authority's certificate",
                ) from error
            raise _TemporaryError(f"{type(error).__name__}: {network_error(error)}") from error
        if response.status_code in _GATEWAY_STATUSES:
            attempts.lost()
        self._check_status(response, content)
        if not is_whole:
            raise UnusableError(f"{self.shown} sent more than {limit:,} bytes")
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise UnusableError(f"{self.shown} sent the encoding `{encoding}`, which was not requested")
        return content

    async def _exchange(
        self, client: httpx2.AsyncClient, body: bytes, limit: int, attempts: Attempts
    ) -> tuple[httpx2.Response, bytes, bool]:
        """Send one request; return the response, its body up to `limit` bytes, and whether that is all."""
        is_sent = False

        async def watch(event: str, info: dict[str, Any]) -> None:
            nonlocal is_sent
            # A proxy's CONNECT has an empty body and is not yet the request.
            is_post = getattr(info.get("request"), "method", None) == b"POST"
            is_sent = is_sent or (is_post and event.endswith("send_request_body.started"))

        request = client.stream("POST", self._url, content=body, extensions={"trace": watch})
        try:
            async with asyncio.timeout(self._timeout), request as response:
                return response, *await _read(response, limit)
        except BaseException:  # also when canceled: the server may be handling the request
            if is_sent:
                attempts.lost()
            raise

    def _check_status(self, response: httpx2.Response, content: bytes) -> None:
        status = response.status_code
        if 200 <= status < 300:
            return
        try:
            phrase = f" {HTTPStatus(status).phrase.lower()}"
        except ValueError:  # a status code without a meaning
            phrase = ""
        reason = f"answered {status}{phrase}: {excerpt(content)}"
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= 500:
            raise _TemporaryError(reason, retry_after(response.headers.get("Retry-After")))
        if 300 <= status < 400:
            where = response.headers.get("Location", "nowhere")
            raise DataError(
                f"{self.shown} answered {status}{phrase}, a redirect to {where}, which is not followed",
                hint="set `url` to the final address",
            )
        hint = self._advice.refused
        if status in (401, 403):
            hint = (
                "name the environment variable with the token in `token_env`" if not self._token else "check the token"
            )
        raise RefusedError(f"{self.shown} {reason}", status=status, hint=hint)

    def clean(self, text: str) -> str:
        """The text without control characters, and without the token if the server has sent it back."""
        return printable(self.without_token(text))

    def without_token(self, text: str) -> str:
        """The text without the token, for files."""
        return text.replace(self._token, "[token]") if self._token else text


async def _read(response: httpx2.Response, limit: int) -> tuple[bytes, bool]:
    """The raw body up to `limit` bytes, and whether that is all."""
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
