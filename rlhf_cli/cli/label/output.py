"""Where data that a command makes goes: to stdout, or whole into a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from rlhf_cli.errors import DiskError
from rlhf_cli.files import write_whole


def write_text(pieces: Iterable[str], out: Path | None) -> None:
    """Write to a file, which is there whole or as it was before, or to stdout where none is named.

    Raises:
        DiskError: it cannot be written.
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
