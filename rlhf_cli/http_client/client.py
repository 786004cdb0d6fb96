"""Post JSON over HTTP to a server that is trusted with texts only, for rewards and judges.

Responses are bounded in size and time, redirects are not followed, control characters are removed from what people
see, and no message contains the token. This is the only place that retries: after temporary failures (no connection,
no response in time, 429, 5xx), with exponential backoff.
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
from rlhf_cli.http_client.attempts import AttemptObserver, NoObserver
from rlhf_cli.plain_text import printable
from rlhf_cli.progress import warn

INITIAL_BACKOFF = 0.5
"""Seconds before the first retry."""

_LONGEST_BACKOFF = 30.0
_LONGEST_WAIT = 600.0
_POLL = 0.2
_EXCERPT = 200
_GATEWAY_ERRORS = (HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT, *range(520, 528))
"""Statuses that a gateway sends for the server behind it, which may still be processing the request."""


class RefusedError(DataError):
    """The server rejected the request (4xx); a retry would not help.

    Args:
        message: see `RLHFError`.
        status: the HTTP status.
        hint: see `RLHFError`.
    """

    def __init__(self, message: str, *, status: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class UnusableError(DataError):
    """The server processed the request, but its response cannot be used."""


class _TemporaryFailure(Exception):  # noqa: N818  (never leaves this module)
    """An attempt failed in a way that a retry may overcome."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


@dataclass(frozen=True)
class Hints:
    """Hints of error messages; they depend on what the server is for.

    Attributes:
        unreachable: hint after all attempts failed.
        rejected: hint after the server rejected a request.
    """

    unreachable: str
    rejected: str


class JSONClient:
    """Posts JSON to one URL. `connect` returns the connection pool for `post`; it is bound to one event loop.

    Args:
        url: URL to POST to.
        token_env: environment variable that holds a bearer token; None sends none.
        timeout: seconds per attempt, from resolving the host to the last byte of the response.
        retries: retries per request after connection errors, timeouts, 429 and 5xx.
        hints: hints of error messages.
        initial_backoff: seconds before the first retry. The wait doubles with every retry, up to 30 s, and is reduced
            by a random share of up to a half, so that many clients do not retry at once.
        stop: is checked while waiting between attempts; None waits to the end.

    Raises:
        UsageError: the URL is invalid, or the token is not in the environment.
    """

    def __init__(
        self,
        url: str,
        *,
        token_env: str | None,
        timeout: float,
        retries: int,
        hints: Hints,
        initial_backoff: float = INITIAL_BACKOFF,
        stop: StopRequest | None = None,
    ) -> None:
        self._url, self.shown = url, without_query(url)
        self._token = check_endpoint(url, token_env)
        self._timeout, self._retries, self._initial_backoff = timeout, retries, initial_backoff
        self._hints, self._stop = hints, stop
        self._random = random.Random()  # its own generator: waiting must not change random numbers of training
        self._warned = False
        if self._token and url.lower().startswith("http:") and not is_loopback(url):
            warn(f"the token in {token_env} is sent to {self.shown} unencrypted; use https")

    @property
    def host(self) -> str:
        """Host and port of the URL."""
        return httpx2.URL(self._url).netloc.decode("ascii")

    def connect(self) -> httpx2.AsyncClient:
        """Open a connection pool. Keep it only for a batch of requests: servers and firewalls drop idle connections."""
        self._warned = False
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # the size of a compressed response has no bound
            "Content-Type": "application/json",
            "User-Agent": f"rlhf-cli/{__version__}",
        }
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            # To a proxy, localhost is another machine.
            return httpx2.AsyncClient(
                headers=headers,
                timeout=None,  # `_exchange` sets one deadline per attempt; those of httpx restart with every byte
                follow_redirects=False,
                trust_env=not is_loopback(self._url),
            )
        except (ImportError, ValueError, httpx2.InvalidURL) as error:  # an unsupported kind of proxy
            raise UsageError(
                f"cannot connect to {self.shown}: the proxy set in the environment cannot be used",
                hint="check HTTP_PROXY, HTTPS_PROXY and ALL_PROXY; NO_PROXY excludes a host",
            ) from error

    async def post(
        self, client: httpx2.AsyncClient, body: bytes, limit: int, observer: AttemptObserver | None = None
    ) -> bytes:
        """Post a request, with retries, and return the body of the successful response.

        Args:
            client: from `connect`.
            body: JSON.
            limit: maximum size of the response in bytes.
            observer: is notified of each attempt.

        Raises:
            RefusedError: the response has a status 4xx other than 429.
            UnusableError: the response is larger than `limit`, or has an encoding that was not requested.
            DataError: all attempts failed, or the server cannot be reached at all.
            Interrupted: a stop was requested between two attempts.
        """
        try:
            return await self._send(client, body, limit, observer or NoObserver())
        except DataError as error:
            error.message = self.clean(error.message)
            error.args = (error.message,)
            raise

    async def _send(self, client: httpx2.AsyncClient, body: bytes, limit: int, observer: AttemptObserver) -> bytes:
        for attempt in range(self._retries + 1):
            await observer.begin()
            try:
                return await self._attempt(client, body, limit, observer)
            except _TemporaryFailure as failure:
                backoff = min(self._initial_backoff * 2**attempt, _LONGEST_BACKOFF) * self._random.uniform(0.5, 1.0)
                pause = max(backoff, failure.pause or 0.0)
                if attempt == self._retries or pause > _LONGEST_WAIT:
                    raise self._given_up(failure, attempt + 1, pause) from failure
                if not self._warned:
                    self._warned = True
                    warn(
                        f"{self.shown}: {self.clean(failure.reason)}; retrying in {pause:.1f} s, "
                        f"at most {self._retries} times"
                    )
                await self._pause(pause)
        raise AssertionError("the last attempt returns or raises")

    async def _pause(self, seconds: float) -> None:
        """Wait, but end early on a stop request: a scheduler kills a process that does not stop in time."""
        end = time.monotonic() + seconds
        while True:
            if self._stop is not None:
                self._stop.check()
            if (left := end - time.monotonic()) <= 0:
                return
            await asyncio.sleep(min(left, _POLL))

    def _given_up(self, failure: _TemporaryFailure, attempts: int, pause: float) -> DataError:
        count = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        wait = f"; the server asks to wait {pause:,.0f} s" if pause > _LONGEST_WAIT else ""
        return DataError(f"{self.shown}: {failure.reason} ({count}{wait})", hint=self._hints.unreachable)

    async def _attempt(self, client: httpx2.AsyncClient, body: bytes, limit: int, observer: AttemptObserver) -> bytes:
        try:
            response, content, is_whole = await self._exchange(client, body, limit, observer)
        except (httpx2.TimeoutException, TimeoutError):
            raise _TemporaryFailure(f"no response within {self._timeout:g} s") from None
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            raise DataError(f"cannot send a request to {self.shown}: {type(error).__name__}") from error
        except httpx2.TransportError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise DataError(
                    f"{self.shown}: its certificate cannot be verified: {error}",
                    hint="set SSL_CERT_FILE to the certificate of your certificate authority",
                ) from error
            raise _TemporaryFailure(f"{type(error).__name__}: {network_error(error)}") from error
        if response.status_code in _GATEWAY_ERRORS:
            observer.outcome_unknown()
        self._check_status(response, content)
        if not is_whole:
            raise UnusableError(f"{self.shown}: the response is larger than {limit:,} bytes")
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise UnusableError(f"{self.shown}: the response has the encoding `{encoding}`, which was not requested")
        return content

    async def _exchange(
        self, client: httpx2.AsyncClient, body: bytes, limit: int, observer: AttemptObserver
    ) -> tuple[httpx2.Response, bytes, bool]:
        """Send one request; return the response, its body up to `limit` bytes, and whether that is the whole body."""
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
        except BaseException:  # cancellation too: the server may be processing the request
            if is_sent:
                observer.outcome_unknown()
            raise

    def _check_status(self, response: httpx2.Response, content: bytes) -> None:
        status = response.status_code
        if 200 <= status < 300:
            return
        try:
            phrase = f" {HTTPStatus(status).phrase.lower()}"
        except ValueError:  # a status without a standard phrase
            phrase = ""
        reason = f"status {status}{phrase}: {excerpt(content)}"
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= 500:
            raise _TemporaryFailure(reason, retry_after(response.headers.get("Retry-After")))
        if 300 <= status < 400:
            where = response.headers.get("Location", "nowhere")
            raise DataError(
                f"{self.shown}: status {status}{phrase}; the redirect to {where} is not followed",
                hint="give the final URL as `url`",
            )
        hint = self._hints.rejected
        if status in (401, 403) and self._token:
            hint = "check the token in the environment variable that `token_env` names"
        elif status in (401, 403):
            hint = "put the token into an environment variable and name it with `token_env`"
        raise RefusedError(f"{self.shown}: {reason}", status=status, hint=hint)

    def clean(self, text: str) -> str:
        """Remove control characters and the token, which a server may send back."""
        return printable(self.without_token(text))

    def without_token(self, text: str) -> str:
        """Replace the token only, for text that goes into files."""
        return text.replace(self._token, "[token]") if self._token else text


async def _read(response: httpx2.Response, limit: int) -> tuple[bytes, bool]:
    """Read the raw body up to `limit` bytes; return it with whether it is complete."""
    parts, size = [], 0
    async for part in response.aiter_raw():
        parts.append(part)
        size += len(part)
        if size > limit:
            return b"".join(parts)[:limit], False
    return b"".join(parts), True


def excerpt(content: bytes) -> str:
    """Return the beginning of a body, for messages."""
    text = " ".join(content[: 16 * _EXCERPT].decode("utf-8", errors="replace").split())
    return (text if len(text) <= _EXCERPT else text[:_EXCERPT] + "...") or "an empty body"
