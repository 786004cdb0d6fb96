"""Prepare the streams, check the arguments and silence libraries; runs before any of them is imported."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence

from rlhf_cli.errors import UsageError
from rlhf_cli.verbosity import is_verbose, set_verbosity, verbosity_of

_DEFAULTS = {
    "PYDANTIC_DISABLE_PLUGINS": "__all__",  # plugin discovery reads the metadata of every installed package
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # otherwise it warns after a fork
}
_SILENCE = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
_LIBRARIES = r"(torch|transformers|trl|peft|accelerate|datasets|huggingface_hub|tokenizers)(\.|$)"

_silence = contextlib.ExitStack()
"""Ends the silence of the libraries when it is closed."""


def prepare() -> None:
    """Set the defaults and hide warnings of libraries. Warnings of rlhf and of the user's code are still shown."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    set_verbosity(verbosity_of())
    if is_verbose():
        return
    for name, value in _SILENCE.items():
        if name not in os.environ:
            os.environ[name] = value
            _silence.callback(os.environ.pop, name, None)
    _silence.enter_context(warnings.catch_warnings())
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    warnings.filterwarnings("ignore", category=FutureWarning)  # often attributed to the caller, which is rlhf


def show_libraries() -> None:
    """Show the warnings of libraries again, which `prepare` has hidden; call it before they are imported."""
    _silence.close()


def prepare_streams() -> None:
    """Open closed standard streams on the null device, and let all text be printed in any encoding."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell (`>&-`): the next file opened would be written to as this stream
            _fill(number)
            stream = os.fdopen(number, mode, encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
        if name == "stdout" and isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            is_utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")


def _fill(number: int) -> None:
    """Open the null device as this file descriptor, unless it is open."""
    try:
        os.fstat(number)
    except OSError:
        found = os.open(os.devnull, os.O_RDWR)
        if found != number:
            os.dup2(found, number)
            os.close(found)


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not text: recipes, manifests and JSON, which hold all paths, are UTF-8.

    Raises:
        UsageError: names the argument.
    """
    for argument in arguments:
        with contextlib.suppress(UnicodeEncodeError):
            argument.encode()
            continue
        encoding = sys.getfilesystemencoding()
        raise UsageError(
            f"the argument `{ascii(argument)[1:-1]}` is not valid {encoding}",
            hint="rename the file or folder so that its name is UTF-8" if encoding == "utf-8" else "set PYTHONUTF8=1",
        )
