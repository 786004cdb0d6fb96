"""Python functions as rewards: found by dotted path or file, called in batches, and never trusted to answer well.

A function is the user's code and runs with the user's rights; its path and hash are shown, and it is never taken from a
downloaded artifact.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from rlhf_cli.data.records import Prompt, prompt_text
from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.rewards.validation import numbers, sample, shown

_FORMS = "`package.module:function` or `file.py:function`"


@dataclass(frozen=True)
class ScoringFunction:
    """A function of prompts and completions that returns one number each, higher is better: a `Reward`.

    It sees a conversation as the text of its turns.

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

    @property
    def name(self) -> str:
        """`file.py:function` without its folder, or `package.module:function`."""
        return self.spec.replace("\\", "/").rpartition("/")[2]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """See `Reward`; all answers in one call.

        Raises:
            DataError: the function raises, or returns too many, too few, or what is no number; names the sample.
        """
        texts = [prompt_text(prompt) for prompt in prompts]
        who = f"the function `{self.spec}`"
        try:
            scores = self.function(list(texts), list(completions))
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise self._raised(who, error, texts, completions) from error
        if not _is_list(scores):
            raise DataError(
                f"{who} returned {shown(scores)}, not a list of scores", hint="return one float for each completion"
            )
        if len(scores) != len(completions):
            raise self._wrong_length(who, len(scores), texts, completions)
        return numbers(who, scores, prompts, completions)

    def _raised(self, who: str, error: BaseException, prompts: Sequence[str], completions: Sequence[str]) -> DataError:
        """Names the first sample that makes the function raise its like when called with it alone, if one does."""
        blame = f"; called with each of the {len(completions):,} samples alone it does not"
        for prompt, completion in zip(prompts, completions, strict=True):
            alone = error if len(completions) == 1 else self._alone(prompt, completion)
            if type(alone) is type(error):
                error, blame = alone, f", for {sample(prompt, completion)}"
                break
        return DataError(
            f"{who} raised {type(error).__name__}: {error} ({_place(error, self.path)}){blame}",
            hint="it is called with a list of prompts and a list of completions, both of strings",
        )

    def _wrong_length(self, who: str, length: int, prompts: Sequence[str], completions: Sequence[str]) -> DataError:
        """Names the first sample for which the function, called with it alone, does not return one score."""
        blame = ""
        for prompt, completion in zip(prompts, completions, strict=True):
            alone = self._alone(prompt, completion)
            if _is_list(alone) and len(alone) != 1:
                blame = f"; {len(alone)} for {sample(prompt, completion)} alone"
                break
        return DataError(
            f"{who} returned {length} scores for {len(completions)} completions{blame}",
            hint="return one float for each completion, in their order, an empty one too",
        )

    def _alone(self, prompt: str, completion: str) -> Any:
        """What the function returns for a single sample, or what it raises."""
        try:
            return self.function([prompt], [completion])
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            return error


def _is_list(scores: Any) -> bool:
    return not isinstance(scores, str | bytes | dict) and hasattr(scores, "__len__") and hasattr(scores, "__getitem__")


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
