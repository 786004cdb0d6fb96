"""Links that let people in: a token for each annotator, one for the administrator, made of a secret beside the store.

A token stands behind the `#` of its link. Browsers send that part to nobody: it is in no log, no Referer and no history
of a proxy. The page sends it in a header of its own, so there is no cookie that another site could make use of.
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
class Links:
    """Where a server is.

    Attributes:
        address: such as `http://127.0.0.1:8100`.
        administrator: link to the page with everybody's progress.
        annotators: name -> their link, in order of their coming.
    """

    address: str
    administrator: str
    annotators: Mapping[str, str]


def secret_path(store: Path) -> Path:
    """Where the secret of a store's links is kept."""
    return store.with_name(store.name + ".secret")


def read_secret(store: Path) -> bytes:
    """The secret of a store's links, made the first time; the links hold until its file is deleted.

    Raises:
        UsageError: others may read the file, or it is none of ours.
        DiskError: it cannot be read or written.
    """
    path = secret_path(store)
    try:
        if not path.exists():
            _make_secret(path)
        if path.stat().st_mode & 0o077:
            raise UsageError(
                f"{path} can be read by others: mode {path.stat().st_mode & 0o777:o}",
                hint=f"run `chmod 600 {path}`; or delete it, and every link becomes a new one",
            )
        secret = bytes.fromhex(path.read_text(encoding="ascii"))
    except OSError as error:
        raise DiskError(f"cannot use {path}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise UsageError(
            f"{path} holds no secret", hint="delete it: a new one is made, and every link becomes a new one"
        ) from error
    if len(secret) != _SECRET_BYTES:
        raise UsageError(
            f"{path} holds {len(secret)} bytes, not {_SECRET_BYTES}",
            hint="delete it: a new one is made, and every link becomes a new one",
        )
    return secret


def _make_secret(path: Path) -> None:
    """Whole or not at all: written under another name first; of two servers that begin at once, the first wins."""
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
    """Makes and checks tokens.

    Args:
        secret: of `read_secret`.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @property
    def administrator(self) -> str:
        """The administrator's token."""
        return "admin." + self._mac("administrator")

    def of(self, annotator: Annotator) -> str:
        """One annotator's token; their number in front says whose it claims to be."""
        return f"{annotator.id}." + self._mac(f"annotator\0{annotator.id}\0{annotator.name}")

    @property
    def store_name(self) -> str:
        """A name of this store for a browser's memory, so that two servers on one port are not mixed up."""
        return self._mac("store")[:12]

    def is_administrator(self, token: str) -> bool:
        """Whether it is the administrator's."""
        return _same(token, self.administrator)

    def is_of(self, token: str, annotator: Annotator) -> bool:
        """Whether it is this annotator's."""
        return _same(token, self.of(annotator))

    def _mac(self, what: str) -> str:
        digest = hmac.new(self._secret, what.encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest[:_TOKEN_BYTES]).decode()


def claimed_annotator(token: str) -> int | None:
    """The number of the annotator whose token it claims to be."""
    number = token.partition(".")[0]
    return int(number) if number.isascii() and number.isdigit() and len(number) < 10 else None


def _same(given: str, right: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), right.encode())
