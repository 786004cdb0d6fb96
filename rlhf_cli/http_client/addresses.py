"""Check URLs and tokens of HTTP endpoints, and read what servers say about retries."""

from __future__ import annotations

import email.utils
import ipaddress
import os
from datetime import UTC, datetime
from urllib.parse import urlsplit, urlunsplit

from rlhf_cli.errors import UsageError
from rlhf_cli.plain_text import printable

_URL_HINT = "write http://HOST:PORT/PATH or https://HOST/PATH"


def check_endpoint(url: str, token_env: str | None) -> str | None:
    """Check a URL and return the token to send, None without `token_env`. Call it before any work.

    Raises:
        UsageError: the URL is invalid or contains a password, or the variable is missing, empty or not a token.
    """
    _check_url(url)
    if token_env is None:
        return None
    token = os.environ.get(token_env, "").strip()
    if not token:
        problem = "is empty" if token_env in os.environ else "is not set"
        raise UsageError(
            f"the environment variable {token_env}, which holds the token for {without_query(url)}, {problem}",
            hint=f"set it: export {token_env}=...",
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"the environment variable {token_env} must hold a token, but has white space or non-ASCII characters",
            hint="set it to the token alone, without `Bearer` and quotes",
        )
    return token


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # reading the port checks it
    except ValueError as error:
        raise UsageError(f"`{printable(url)}` is not a valid URL: {error}", hint=_URL_HINT) from error
    if parts.scheme.lower() not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise UsageError(f"`{printable(url)}` is not a valid URL", hint=_URL_HINT)
    if "?" in url or "#" in url:
        raise UsageError(
            f"the URL {without_query(url)} has a query or a fragment, which would be written to files and logs",
            hint="put a token into an environment variable and name it with `token_env`; put the rest into the path",
        )
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            f"the URL {without_query(url)} has a name or password, which would be written to logs",
            hint="put a token into an environment variable and name it with `token_env`",
        )


def without_query(url: str) -> str:
    """Return a URL without name, password, query and fragment, where secrets may be, for messages."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def is_loopback(url: str) -> bool:
    """Return whether the host of a URL is this machine, by name or loopback address."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def network_error(error: Exception) -> BaseException:
    """Return the operating system's error, such as "connection refused", from under less specific exceptions."""
    found, at = error, error
    while at := at.exceptions[-1] if isinstance(at, BaseExceptionGroup) else at.__cause__ or at.__context__:
        if isinstance(at, OSError) and at.errno is not None:
            found = at
    return found


def retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, given as seconds or as a date (RFC 9110, section 10.2.3)."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        moment = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None  # neither form: ignore the header
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
