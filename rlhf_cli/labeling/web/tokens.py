"""Access links: one token per annotator and one for the administrator, derived from a secret next to the store.

A token follows the `#` of its link. Browsers never send that part: it appears in no log, Referer header or proxy
history. The page sends it in a header, so there is no cookie that another site could use.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.errors import DiskError, UsageError
from rlhf_cli.files import fsync
from rlhf_cli.labeling.session.types import Annotator

_SECRET_BYTES = 32
_TOKEN_BYTES = 24


@dataclass(frozen=True)
class ServerLinks:
    """Address and links of a running server.

    Attributes:
        address: such as `http://127.0.0.1:8100`.
        administrator: link to the admin page.
        annotators: name -> link, in the order in which they were created.
    """

    address: str
    administrator: str
    annotators: Mapping[str, str]


def secret_path(store: Path) -> Path:
    """Path of the secret of a store's links."""
    return store.with_name(store.name + ".secret")


def read_secret(store: Path) -> bytes:
    """Read the secret of a store's links; created on first use. Links stay valid until its file is deleted.

    Raises:
        UsageError: other users can read the file, or it holds no secret.
        DiskError: the file cannot be read or written.
    """
    path = secret_path(store)
    try:
        if not path.exists():
            _make_secret(path)
        if path.stat().st_mode & 0o077:
            raise UsageError(
                f"{path} is readable by other users: mode {path.stat().st_mode & 0o777:o}",
                hint=f"run `chmod 600 {path}`; or delete it, which changes all links",
            )
        secret = bytes.fromhex(path.read_text(encoding="ascii"))
    except OSError as error:
        raise DiskError(f"cannot use {path}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise UsageError(
            f"{path} holds no secret", hint="delete it: a new one is created, and all links change"
        ) from error
    if len(secret) != _SECRET_BYTES:
        raise UsageError(
            f"{path} must hold {_SECRET_BYTES} bytes, got {len(secret)}",
            hint="delete it: a new one is created, and all links change",
        )
    return secret


def _make_secret(path: Path) -> None:
    """Create the file atomically: of two servers that start at once, the first wins."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_SECRET_BYTES))
            fsync(file)
        try:
            path.hardlink_to(draft)
        except FileExistsError:
            return
    finally:
        draft.unlink()


class Tokens:
    """Creates and checks tokens.

    Args:
        secret: see `read_secret`.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @property
    def administrator(self) -> str:
        """The administrator's token."""
        return "admin." + self._mac("administrator")

    def of(self, annotator: Annotator) -> str:
        """The token of one annotator; the number in front names the annotator."""
        return f"{annotator.id}." + self._mac(f"annotator\0{annotator.id}\0{annotator.name}")

    @property
    def store_name(self) -> str:
        """Name of this store in a browser's storage, so that two servers on one port are kept apart."""
        return self._mac("store")[:12]

    def is_administrator(self, token: str) -> bool:
        """Whether this is the administrator's token."""
        return _same(token, self.administrator)

    def is_of(self, token: str, annotator: Annotator) -> bool:
        """Whether this is the token of this annotator."""
        return _same(token, self.of(annotator))

    def _mac(self, what: str) -> str:
        digest = hmac.new(self._secret, what.encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest[:_TOKEN_BYTES]).decode()


def claimed_annotator(token: str) -> int | None:
    """Number of the annotator that a token names; None if it names none."""
    number = token.partition(".")[0]
    return int(number) if number.isascii() and number.isdigit() and len(number) < 10 else None


def _same(given: str, right: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), right.encode())
