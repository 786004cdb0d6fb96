"""Errors that users can cause, in one class tree, each with the exit code of the command.

A message says where, what and the value received; a hint says how to fix it. Both are lower case and have no trailing
full stop. Any other exception is a bug of ours and shows its traceback.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_DATA = 65
EXIT_DIVERGED = 70
EXIT_DISK = 74
EXIT_IN_USE = 75
EXIT_WAITING = 76
EXIT_COST = 77
EXIT_REQUIREMENT = 78
EXIT_STALLED = 124


class RLHFError(Exception):
    """Base class of all errors that users can cause.

    Args:
        message: where, what, and the value received.
        hint: one line that says how to fix it.
    """

    code = "failed"
    """Kind of the error, for programs; it stays the same from version to version."""
    exit_code = 1
    problems: Sequence[str] = ()
    """One message per problem, if one error reports several."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(RLHFError):
    """A command line that cannot be carried out: a missing input, two settings that exclude each other.

    Args:
        message: see `RLHFError`.
        hint: likewise.
        setting: setting whose value is refused, or the end of its name; where it is known, `LoadedRecipe.locating` puts
            the `file:line` of the setting before the message.
        value: the value, or the entry of a list, that is refused; None is any.
    """

    code = "usage"
    exit_code = EXIT_USAGE

    def __init__(
        self, message: str, *, hint: str | None = None, setting: str | None = None, value: object = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.setting, self.value = setting, value


class RecipeError(UsageError):
    """A recipe with problems, reported all at once.

    Args:
        problems: one message per problem, each with its location (`file:line`).
    """

    code = "recipe"

    def __init__(self, problems: list[str], *, hint: str | None = None) -> None:
        super().__init__("\n".join(problems), hint=hint)
        self.problems = problems


class ChangedInputsError(UsageError):
    """An unfinished stage would resume with other settings or data than it started with."""

    code = "changed-inputs"


class DataError(RLHFError):
    """Data that cannot be used; the message has `file:line`, field and value."""

    code = "data"
    exit_code = EXIT_DATA


class ModelError(RLHFError):
    """A model or tokenizer that does not fit its use."""

    code = "model"
    exit_code = EXIT_DATA


def raise_all(errors: Sequence[RLHFError]) -> None:
    """Raise the only error as it is, or several as one that lists them with their hints; do nothing for none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [f"{one.message} (hint: {one.hint})" if one.hint else one.message for one in errors]
        combined = type(errors[0])("\n".join(problems))
        combined.problems = problems
        raise combined


def is_raised_here(error: BaseException) -> bool:
    """Whether a line of this package raised an exception, not one of a library that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(_PACKAGE)


_PACKAGE = Path(__file__).resolve().parent


class DivergedError(RLHFError):
    """Training produced values that are not finite, also after one rollback."""

    code = "diverged"
    exit_code = EXIT_DIVERGED


class DetectorStopError(RLHFError):
    """A detector of PPO passed its `stop` threshold. The state is saved: a higher threshold lets the run continue."""

    code = "detector-stop"
    exit_code = EXIT_DIVERGED


class ServerLostError(RLHFError):
    """The server that samples does not respond any more, or has lost the weights it was given."""

    code = "server-lost"


class SharedEngineError(RLHFError):
    """An engine that several processes share failed in this one: the others wait in the middle of its work.

    So it is not an error that processes agree on (`distributed.agreement`): it ends this process, and the launcher ends
    the others.
    """

    code = "model"
    exit_code = EXIT_DATA


class DiskError(RLHFError):
    """The disk is full or cannot be written; the last good state is kept."""

    code = "disk"
    exit_code = EXIT_DISK


class StorageError(RLHFError):
    """Storage behind a URL that cannot be used; what is on the disk of this machine is intact.

    Args:
        message: see `RLHFError`.
        hint: likewise.
        is_temporary: another attempt may succeed.
    """

    code = "storage"
    exit_code = EXIT_DISK

    def __init__(self, message: str, *, hint: str | None = None, is_temporary: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.is_temporary = is_temporary


class HostMemoryError(RLHFError):
    """The machine has no memory for a copy that a setting asks for; the last good state is kept."""

    code = "host-memory"


class RunInUseError(RLHFError):
    """Another process holds the lock of this run directory."""

    code = "in-use"
    exit_code = EXIT_IN_USE


class WaitingForLabelsError(RLHFError):
    """The `label` stage waits for people to finish labeling; nothing is wrong and nothing is lost.

    Args:
        message: how many labels are done and how many remain.
        store: file with the labels.
        hint: see `RLHFError`.
    """

    code = "waiting-for-labels"
    exit_code = EXIT_WAITING

    def __init__(self, message: str, *, store: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.store = store


class CostLimitError(RLHFError):
    """The next judgment could exceed the cost limit of the recipe; those paid for are kept."""

    code = "cost-limit"
    exit_code = EXIT_COST


class RequirementError(RLHFError):
    """A finished artifact does not meet what the recipe requires of it; it is kept, and the stages after it wait."""

    code = "requirement"
    exit_code = EXIT_REQUIREMENT


class ProcessDiedError(RLHFError):
    """One of several processes was killed or reported no error; the others were ended too.

    Args:
        message: which process, and how it ended.
        exit_code: of the command: 128 + signal, or that of the process.
        hint: see `RLHFError`.
    """

    code = "process-died"

    def __init__(self, message: str, *, exit_code: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


class ReportedError(RLHFError):
    """A failure of a process that was already shown to the user.

    Args:
        exit_code: of the command.
        plain: the error as an object, for `--json`.
    """

    def __init__(self, exit_code: int, plain: dict[str, Any]) -> None:
        super().__init__(f"a process ended with exit code {exit_code}")
        self.exit_code = exit_code
        self.plain = plain


class Interrupted(RLHFError):  # noqa: N818  (not a bug: a request to stop that was honored)
    """A signal stopped the command; the same command resumes after what was finished, if anything was.

    Args:
        signum: the signal.
    """

    code = "interrupted"

    def __init__(self, signum: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name}; finished steps and batches are saved",
            hint="run the same command again, which resumes after the last of them, if there is one",
        )
        self.signum = signum
        # Shells report 128 + signal; schedulers send SIGUSR1 ahead of SIGTERM, so it counts as SIGTERM.
        self.exit_code = 130 if signum == signal.SIGINT else 143
