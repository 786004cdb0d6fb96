"""Every error a user can cause, in one tree, each with the exit code the command ends with.

A message says where, what and the value received; a hint says how to mend it. Both are lower case and
carry no trailing full stop. Anything that is not one of these is our bug and shows its traceback.
"""

from __future__ import annotations

import signal

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_DATA = 65
EXIT_DIVERGED = 70
EXIT_DISK = 74
EXIT_IN_USE = 75
EXIT_WAITING = 76
EXIT_COST = 77
EXIT_STALLED = 124


class RLHFError(Exception):
    """Base of all errors a user can cause.

    Args:
        message: where, what, and the value received.
        hint: one line that says how to mend it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(RLHFError):
    """A command line that cannot be carried out: a missing input, two settings that exclude each other."""

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """A recipe with problems; all of them at once.

    Args:
        problems: one message a problem, each with its place (`file:line`).
    """

    def __init__(self, problems: list[str], *, hint: str | None = None) -> None:
        super().__init__("\n".join(problems), hint=hint)
        self.problems = problems


class ChangedInputsError(UsageError):
    """An unfinished stage would continue under other settings or data than it began with."""


class DataError(RLHFError):
    """Data that cannot be used: `file:line`, the field, the value."""

    exit_code = EXIT_DATA


class ModelError(RLHFError):
    """A model or tokenizer that does not fit what is asked of it."""

    exit_code = EXIT_DATA


class DivergedError(RLHFError):
    """Training produced values that are not finite, and going back once did not help."""

    exit_code = EXIT_DIVERGED


class DiskError(RLHFError):
    """The disk is full or cannot be written; the last good state is kept."""

    exit_code = EXIT_DISK


class RunInUseError(RLHFError):
    """Another process holds the lock of this run directory."""

    exit_code = EXIT_IN_USE


class WaitingForLabelsError(RLHFError):
    """The pipeline has come to `label` and people have not finished there yet; nothing is wrong, and nothing lost.

    Args:
        message: how much is done and left.
        store: file with the labels.
        hint: see `RLHFError`.
    """

    exit_code = EXIT_WAITING

    def __init__(self, message: str, *, store: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.store = store


class CostLimitError(RLHFError):
    """The next verdict of a judge could cost more than the recipe allows; those paid for are kept."""

    exit_code = EXIT_COST


class ProcessDiedError(RLHFError):
    """One of several processes was killed, or ended without a word; the others were ended too.

    Args:
        message: which, and how.
        exit_code: of the command: 128 + the signal, or the process's own.
        hint: see `RLHFError`.
    """

    def __init__(self, message: str, *, exit_code: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


class ReportedError(RLHFError):
    """A failure of a process that the user has been shown already; only its exit code is left to give."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"a process ended with exit code {exit_code}")
        self.exit_code = exit_code


class Interrupted(RLHFError):  # noqa: N818  (not an error of the program: a request to stop that was honored)
    """A signal asked the work to stop; what was done is saved and the same command goes on."""

    def __init__(self, signum: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name}; everything done so far is saved",
            hint="run the same command again to go on from here",
        )
        self.signum = signum
        # The shell's convention is 128 + signal; SIGUSR1 is what schedulers send ahead of SIGTERM, so it counts as one.
        self.exit_code = 130 if signum == signal.SIGINT else 143
