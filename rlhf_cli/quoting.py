"""Commands that messages print, so that a shell reads them as they are meant."""

from __future__ import annotations

import shlex
from pathlib import Path


def word(value: Path | str) -> str:
    """Return a path or a name as one word of a command, quoted where a shell would split or expand it."""
    return shlex.quote(str(value))
