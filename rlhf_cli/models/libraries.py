"""What the libraries under the models print, and what their errors say."""

from __future__ import annotations

import os

import transformers


def quiet_libraries() -> None:
    """Silence the warnings and progress bars of transformers and tokenizers; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
