"""What the libraries under the models print, and what their errors say."""

from __future__ import annotations

import os

import transformers

from rlhf_cli.verbosity import is_verbose


def quiet_libraries() -> None:
    """Silence the warnings and progress bars of transformers and tokenizers, unless `--verbose`; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if is_verbose():
        return
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return what an exception says in one line; libraries put a title before what matters."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") and len(lines) > 1 else lines[0]
