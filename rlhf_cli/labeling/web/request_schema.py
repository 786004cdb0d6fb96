"""Parses request bodies: JSON objects of bounded size that hold exactly the expected fields."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_cli.errors import RLHFError

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_BODY = 128 * 1024
"""In bytes; large enough for the longest note with every character escaped."""
_READ_SECONDS = 15.0


class RequestError(RLHFError):
    """A request that is refused.

    Args:
        status: HTTP status.
        message: what is wrong with it.
        hint: see `RLHFError`.
    """

    def __init__(self, status: int, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


async def read_object(request: Request, fields: Mapping[str, type], optional: frozenset[str] = frozenset()) -> dict:
    """Read the JSON object of a request.

    Args:
        request: to read from.
        fields: name -> type; `float` accepts whole numbers too, but only finite values.
        optional: fields that may be missing.

    Raises:
        RequestError: 415 wrong content type, 413 too long, 408 too slow, 400 any other problem.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "the content type must be JSON", hint="send `content-type: application/json`")
    try:
        plain = json.loads(await _bounded(request), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "the body is not valid JSON") from error
    if not isinstance(plain, dict):
        raise RequestError(400, "the body must be a JSON object")
    if unknown := sorted(set(plain) - set(fields)):
        raise RequestError(400, f"unknown field `{unknown[0][:40]}`", hint=f"valid fields: {', '.join(fields)}")
    for name, kind in fields.items():
        if name in plain:
            plain[name] = _typed(name, plain[name], kind)
        elif name not in optional:
            raise RequestError(400, f"the field `{name}` is missing")
    return plain


async def _bounded(request: Request) -> bytes:
    too_long = RequestError(413, f"the body is longer than {MAX_BODY:,} bytes")
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or len(length) > 12 or int(length) > MAX_BODY:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(_READ_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise too_long
    except TimeoutError as error:
        raise RequestError(408, f"the body did not arrive within {_READ_SECONDS:.0f} seconds") from error
    return bytes(body)


def _typed(name: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e15:
        value = float(value)
    is_right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    if not is_right or (kind is float and not math.isfinite(value)):
        expected = {int: "a whole number", float: "a number", str: "a text", dict: "an object"}[kind]
        raise RequestError(400, f"`{name}` must be {expected}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")
