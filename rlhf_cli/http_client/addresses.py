"""Checks of addresses and tokens, and the Retry-After header."""

from __future__ import annotations

import email.utils
import ipaddress
import os
from datetime import UTC, datetime
from urllib.parse import urlsplit, urlunsplit

from rlhf_cli.errors import UsageError
from rlhf_cli.progress import printable

_ADDRESSES = "write http://HOST:PORT/PATH or https://HOST/PATH"


def check_endpoint(url: str, token_env: str | None) -> str | None:
    """Check an address and return the token to send, if one is named; call it before any work.

    Raises:
        UsageError: the URL has no host or contains a password; the variable is missing, empty or not a token.
    """
    _check_url(url)
    if token_env is None:
        return None
    token = os.environ.get(token_env, "").strip()
    if not token:
        problem = "is empty" if token_env in os.environ else "is not set"
        raise UsageError(
            f"the environment variable {token_env}, which holds the token of {without_query(url)}, {problem}",
            hint=f"set it: export {token_env}=...",
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"the environment variable {token_env} is not a token: it holds white space or characters beyond ASCII",
            hint="set it to the token only, without `Bearer` and quotes",
        )
    return token


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # reading the port checks it
    except ValueError as error:
        raise UsageError(f"`{printable(url)}` is not an address: {error}", hint=_ADDRESSES) from error
    if parts.scheme.lower() not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise UsageError(f"`{printable(url)}` is not an address", hint=_ADDRESSES)
    if "?" in url or "#" in url:
        raise UsageError(
            f"the address {without_query(url)} has a query or a fragment, which would end up in files and logs",
            hint="put a token into an environment variable and name it in `token_env`; put the rest into the path",
        )
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            f"the address {without_query(url)} has a name or password, which would end up in logs",
            hint="put a token into an environment variable and name it in `token_env`",
        )


def without_query(url: str) -> str:
    """An address that can be shown: without name, password, query and fragment, which may hold secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def is_loopback(url: str) -> bool:
    """Whether an address names this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def network_error(error: Exception) -> BaseException:
    """The system's error, such as "connection refused", which libraries wrap in less specific ones."""
    found, at = error, error
    while at := at.exceptions[-1] if isinstance(at, BaseExceptionGroup) else at.__cause__ or at.__context__:
        if isinstance(at, OSError) and at.errno is not None:
            found = at
    return found


def retry_after(header: str | None) -> float | None:
    """Seconds in a Retry-After header, which holds seconds or a date (RFC 9110, section 10.2.3)."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        moment = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None  # neither: ignored
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
