"""Python functions as rewards: loaded by dotted path or file, called in batches, with validated results.

A function is the user's code and runs with the user's rights. Its path and hash are shown, and it is never loaded from
a downloaded artifact.
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
from rlhf_cli.rewards.base import COLUMNS, NO_COLUMNS, Columns, check_known
from rlhf_cli.rewards.validation import numbers, sample, shown

_More = dict[str, list[Any]]

_SPELLINGS = "`package.module:function` or `file.py:function`"


@dataclass(frozen=True)
class ScoringFunction:
    """A `Reward` that calls a function of prompts and completions, which returns one number per completion.

    The function receives a conversation as the text of its turns. Further parameters named in `COLUMNS` receive these
    columns; one without a default must be known.

    Attributes:
        spec: the name by which the user gave it.
        path: its source file.
        digest: SHA-256 of that file.
        function: the function itself.
    """

    spec: str
    path: Path
    digest: str
    function: Callable[..., Sequence[float]]

    @property
    def name(self) -> str:
        """`file.py:function` without its folder, or `package.module:function`."""
        return self.spec.replace("\\", "/").rpartition("/")[2]

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Columns = NO_COLUMNS
    ) -> list[float]:
        """Score all completions in one call; see `Reward`.

        Raises:
            DataError: the function raises, does not return one number per completion (names the sample), or asks for a
                column that is not known.
        """
        texts = [prompt_text(prompt) for prompt in prompts]
        origin = f"the function `{self.spec}`"
        more = self._columns(origin, columns)
        try:
            scores = self.function(list(texts), list(completions), **more)
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise self._raised(origin, error, texts, completions, more) from error
        if not _is_list(scores):
            raise DataError(
                f"{origin} returned {shown(scores)}, not a list of scores", hint="return one float per completion"
            )
        if len(scores) != len(completions):
            raise self._wrong_length(origin, len(scores), texts, completions, more)
        return numbers(origin, scores, prompts, completions)

    def _columns(self, origin: str, columns: Columns) -> _More:
        """Return the columns that the function's signature asks for."""
        try:
            _, _, *rest = inspect.signature(self.function).parameters.values()
        except ValueError:  # no signature, as many functions written in C; or fewer than two parameters
            return {}
        asked = {parameter.name: parameter for parameter in rest if parameter.name in COLUMNS}
        check_known(origin, [name for name, one in asked.items() if one.default is one.empty], columns)
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in rest)
        return {name: list(values) for name, values in columns.items() if takes_all or name in asked}

    def _raised(
        self, origin: str, error: BaseException, prompts: Sequence[str], completions: Sequence[str], more: _More
    ) -> DataError:
        """Name the first sample for which the function raises the same error when called with it alone, if any."""
        blame = f"; it does not raise if called with each of the {len(completions):,} samples alone"
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            alone = error if len(completions) == 1 else self._alone(prompt, completion, more, row)
            if type(alone) is type(error):
                error, blame = alone, f", for {sample(prompt, completion)}"
                break
        return DataError(
            f"{origin} raised {type(error).__name__}: {error} ({_position(error, self.path)}){blame}",
            hint="it is called with a list of prompts and a list of completions, both lists of strings",
        )

    def _wrong_length(
        self, origin: str, length: int, prompts: Sequence[str], completions: Sequence[str], more: _More
    ) -> DataError:
        """Name the first sample for which the function does not return one score if called with it alone."""
        blame = ""
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            alone = self._alone(prompt, completion, more, row)
            if _is_list(alone) and len(alone) != 1:
                blame = f"; {len(alone)} for {sample(prompt, completion)} alone"
                break
        return DataError(
            f"{origin} returned {length} scores for {len(completions)} completions{blame}",
            hint="return one float per completion, in the same order, even for an empty one",
        )

    def _alone(self, prompt: str, completion: str, more: _More, row: int) -> Any:
        """Return the function's result for a single sample, or the error that it raises."""
        try:
            return self.function([prompt], [completion], **{name: [values[row]] for name, values in more.items()})
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            return error


def _is_list(scores: Any) -> bool:
    return not isinstance(scores, str | bytes | dict) and hasattr(scores, "__len__") and hasattr(scores, "__getitem__")


def load_scoring_function(spec: str) -> ScoringFunction:
    """Load a function by name.

    Args:
        spec: `package.module:function` or `file.py:function`.

    Raises:
        UsageError: there is no such function, or its module cannot be loaded.
    """
    position, colon, name = spec.rpartition(":")
    if not colon or not position or not name.isidentifier():
        raise UsageError(f"`{spec}` does not name a function", hint=f"write {_SPELLINGS}")
    module = _module_from_file(spec, Path(position)) if position.endswith(".py") else _module_by_name(spec, position)
    function = getattr(module, name, None)
    if function is None:
        known = sorted(key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_")
        hint = f"it has: {', '.join(known)}" if known else "it has no functions"
        raise UsageError(f"`{position}` has no function `{name}`", hint=hint)
    if not callable(function):
        raise UsageError(f"`{spec}` must be a function, got {type(function).__name__}", hint=f"write {_SPELLINGS}")
    path = Path(module.__file__ or position)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ScoringFunction(spec, path, digest, cast(Callable[..., Sequence[float]], function))


def _module_from_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(
            f"`{spec}`: there is no file {path}", hint=f"write {_SPELLINGS}; paths are relative to {Path.cwd()}"
        )
    path = path.resolve()
    # A unique name, so that two files called reward.py replace neither each other nor a library.
    name = f"rlhf_function_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickles in the file look up their module here
    try:
        found.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        del sys.modules[name]
        raise UsageError(
            f"{path} cannot be loaded: {type(error).__name__}: {error} ({_position(error, path)})"
        ) from error
    return module


def _module_by_name(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"`{spec}`: there is no module `{error.name}`", hint=f"write {_SPELLINGS}; give a file with its `.py`"
        ) from error
    except Exception as error:  # whatever the user's code raises
        raise UsageError(f"`{name}` cannot be imported: {type(error).__name__}: {error}") from error


def _position(error: BaseException, path: Path) -> str:
    """Return the place of an error in the user's file, by the innermost line of that file."""
    line, frame = None, error.__traceback__
    while frame is not None:
        if Path(frame.tb_frame.f_code.co_filename) == path:
            line = frame.tb_lineno
        frame = frame.tb_next
    if line is None and isinstance(error, SyntaxError):
        line = error.lineno
    return f"{path}:{line}" if line else str(path)
