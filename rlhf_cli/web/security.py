"""Request filter in front of the application: rejects requests that our own pages did not send.

Any web site can make a visitor's browser send requests to 127.0.0.1. Three rules prevent misuse: an unknown Host is
rejected (DNS rebinding), a foreign Origin or a request the browser marks as cross-site is rejected, and there are no
cookies, so a request carries only the token our page adds.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?")
_LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
_PAGES = frozenset({"/", "/admin"})

HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        b"trusted-types 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""Sent with every response: scripts and styles load from our own files only, and text never becomes markup."""


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class RequestGuard:
    """Rejects requests that our own pages did not send, with 403 and the reason in plain text.

    Args:
        app: the application.
        host: address the server listens on.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._is_wildcard = host in ("0.0.0.0", "::")  # noqa: S104  (compared, not listened at)
        own = f"[{host}]" if ":" in host else host.lower()
        self._names = _LOOPBACK_NAMES | {own}
        if self._is_wildcard:
            self._names |= {socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request (ASGI)."""
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served here; got {scope['type']}")

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        if (reason := self.refusal(scope)) is None:
            await self._app(scope, receive, send_guarded)
            return
        text = f"refused: {reason}\n".encode()
        length = str(len(text)).encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", length)]
        await send_guarded({"type": "http.response.start", "status": 403, "headers": headers})
        await send_guarded({"type": "http.response.body", "body": text})

    def refusal(self, scope: Scope) -> str | None:
        """Reason to reject a request; None to accept it."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1").lower())
        hosts = headers.get("host", [])
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return "unknown Host; open the link exactly as you received it"
        origins = headers.get("origin", [])
        if origins and origins != [f"http://{hosts[0]}"]:
            return "the request has a foreign Origin"
        sites = headers.get("sec-fetch-site", [])
        if sites and set(sites) - {"same-origin", "none"} and not _is_followed_link(scope, headers):
            return "the request comes from another site"
        return None

    def _is_ours(self, host: str) -> bool:
        """Numeric addresses are accepted, since DNS cannot fake them; names must be known."""
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        if match[1] in self._names:
            return True
        if not self._is_wildcard:
            return False
        try:
            ipaddress.ip_address(match[1].strip("[]"))
        except ValueError:
            return False
        return True


def _is_followed_link(scope: Scope, headers: dict[str, list[str]]) -> bool:
    """Whether a user followed a link to one of the pages, for example in an e-mail: the pages hold no secrets."""
    return (
        scope["method"] == "GET"
        and scope["path"] in _PAGES
        and headers.get("sec-fetch-mode") == ["navigate"]
        and headers.get("sec-fetch-dest") == ["document"]
        and headers.get("sec-fetch-user") == ["?1"]
    )
