"""How much a command prints on stderr: `--quiet`, `--verbose`, and the variables of the environment for both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum

QUIET_VARIABLE, VERBOSE_VARIABLE = "RLHF_QUIET", "RLHF_VERBOSE"
_OFF = ("", "0")


class Verbosity(Enum):
    """How much is printed: errors alone, messages, or also details, warnings of libraries and tracebacks."""

    QUIET = "quiet"
    NORMAL = "normal"
    VERBOSE = "verbose"


_current = Verbosity.NORMAL


def set_verbosity(verbosity: Verbosity) -> None:
    """Set how much this process prints."""
    global _current
    _current = verbosity


def is_quiet() -> bool:
    """Whether messages are not printed."""
    return _current is Verbosity.QUIET


def is_verbose() -> bool:
    """Whether details, warnings of libraries and tracebacks are printed too."""
    return _current is Verbosity.VERBOSE


def verbosity_of(environment: Mapping[str, str] = os.environ) -> Verbosity:
    """Return what `RLHF_QUIET` and `RLHF_VERBOSE` ask for; the second one decides if both are set."""
    if environment.get(VERBOSE_VARIABLE, "") not in _OFF:
        return Verbosity.VERBOSE
    return Verbosity.QUIET if environment.get(QUIET_VARIABLE, "") not in _OFF else Verbosity.NORMAL
