"""Python functions as scorers: found by dotted path or file, called in batches, and never trusted to answer well.

A function is the user's code and runs with the user's rights; its path and hash are shown, and it is never taken from a
downloaded artefact.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from rlhf_cli.errors import DataError, UsageError

_FORMS = "`package.module:function` or `file.py:function`"
_SHOWN = 60


@dataclass(frozen=True)
class ScoringFunction:
    """A function of prompts and completions that returns one number each, higher is better.

    Attributes:
        spec: how it was named.
        path: its source file.
        digest: SHA-256 of that file.
        function: the function itself.
    """

    spec: str
    path: Path
    digest: str
    function: Callable[[list[str], list[str]], Sequence[float]]

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        """Score each completion: as many floats as completions, all finite.

        Raises:
            DataError: the function raises, or returns too many, too few, or what is no finite number; names the sample.
        """
        try:
            scores = self.function(list(prompts), list(completions))
        except Exception as error:  # whatever the user's code raises
            raise DataError(
                f"{self._name} raised {type(error).__name__}: {error} ({_place(error, self.path)})",
                hint="it is called with a list of prompts and a list of completions, both of strings",
            ) from error
        if isinstance(scores, str | bytes) or not hasattr(scores, "__len__") or not hasattr(scores, "__getitem__"):
            raise DataError(
                f"{self._name} returned {_shown(scores)}, not a list of scores",
                hint="return one float for each completion",
            )
        if len(scores) != len(completions):
            raise DataError(
                f"{self._name} returned {len(scores)} scores for {len(completions)} completions",
                hint="return one float for each completion, in their order",
            )
        return [self._checked(scores[n], prompts[n], completions[n]) for n in range(len(completions))]

    def _checked(self, score: Any, prompt: str, completion: str) -> float:
        # NumPy's and torch's scalars are numbers too; a string of digits is a mistake.
        number = score.item() if hasattr(score, "item") and getattr(score, "shape", None) in ((), None) else score
        if isinstance(number, Real) and math.isfinite(number):
            return float(number)
        wrong = "is not finite" if isinstance(number, Real) else "is not a number"
        raise DataError(
            f"{self._name} returned {_shown(score)}, which {wrong}, for the prompt {_shown(prompt)}"
            f" and the completion {_shown(completion)}",
            hint="return a finite float for every completion, an empty one too",
        )

    @property
    def _name(self) -> str:
        return f"the function `{self.spec}`"


def load_scoring_function(spec: str) -> ScoringFunction:
    """Load a function by name.

    Args:
        spec: `package.module:function` or `file.py:function`.

    Raises:
        UsageError: nothing of that name, or it is not a function.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise UsageError(f"`{spec}` names no function", hint=f"write {_FORMS}")
    module = _module_from_file(spec, Path(place)) if place.endswith(".py") else _module_by_name(spec, place)
    function = getattr(module, name, None)
    if function is None:
        known = sorted(key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_")
        hint = f"it has: {', '.join(known)}" if known else "it has no functions"
        raise UsageError(f"`{place}` has no function `{name}`", hint=hint)
    if not callable(function):
        raise UsageError(f"`{spec}` is {type(function).__name__}, not a function", hint=f"write {_FORMS}")
    path = Path(module.__file__ or place)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ScoringFunction(spec, path, digest, cast(Callable[[list[str], list[str]], Sequence[float]], function))


def _module_from_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(
            f"no file {path}, which `{spec}` names", hint=f"write {_FORMS}; paths start here, in {Path.cwd()}"
        )
    path = path.resolve()
    # A name of its own, so that two files called reward.py do not take each other's place, nor a library's.
    name = f"rlhf_function_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickles in the file look themselves up here
    try:
        found.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        del sys.modules[name]
        raise UsageError(f"{path} cannot be loaded: {type(error).__name__}: {error} ({_place(error, path)})") from error
    return module


def _module_by_name(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"no module `{error.name}`, which `{spec}` needs", hint=f"write {_FORMS}; a file is named with its `.py`"
        ) from error
    except Exception as error:  # whatever the user's code raises
        raise UsageError(f"`{name}` cannot be imported: {type(error).__name__}: {error}") from error


def _place(error: BaseException, path: Path) -> str:
    """Where in the user's file it happened: the innermost line of that file."""
    line, frame = None, error.__traceback__
    while frame is not None:
        if Path(frame.tb_frame.f_code.co_filename) == path:
            line = frame.tb_lineno
        frame = frame.tb_next
    if line is None and isinstance(error, SyntaxError):
        line = error.lineno
    return f"{path}:{line}" if line else str(path)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
