"""Writes exported data to stdout or to a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from rlhf_cli.errors import DiskError
from rlhf_cli.files import write_whole


def write_text(pieces: Iterable[str], out: Path | None) -> None:
    """Write to a file, atomically, or to stdout if no file is named.

    Raises:
        DiskError: the file cannot be written.
    """
    if out is None:
        for piece in pieces:
            sys.stdout.buffer.write(piece.encode())
        sys.stdout.flush()
        return
    try:
        write_whole(out, pieces)
    except OSError as error:
        raise DiskError(
            f"cannot write {out}: {error.strerror or error}", hint="name another file with `--out`"
        ) from error
