"""The questions of `rlhf start`. What an option says already is not asked; `rlhf init` asks nothing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.markup import escape

from rlhf_cli.console import console, spinner
from rlhf_cli.errors import RLHFError, UsageError
from rlhf_cli.progress import say, warn
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.settings.shared import DataSettings
from rlhf_cli.start import label_choice
from rlhf_cli.start.data_facts import DemonstrationFacts, PromptFacts, inspect_demonstrations, inspect_prompts
from rlhf_cli.start.draft import FULL_STEPS, SHORT_STEPS, Draft
from rlhf_cli.start.label_choice import LabelChoice
from rlhf_cli.start.model_facts import ModelFacts, check_role, inspect_model

T = TypeVar("T")

_OFFERED = re.compile(r"--set '?(data\.(?:columns|max_skip)=(?:\{[^}]*\}|[^\s'`]+))")
"""Settings in a hint that say how a file is read."""
_PLACEHOLDER = re.compile(r": (NAME|yours)\b")
"""Where the person has to write a name of theirs, so that the setting cannot be used as it is."""
_SOURCES = (
    "I rank them myself, in this terminal or in a browser",
    "I have preferences or rankings in a file",
    "a judge: a language model that compares them",
    "a Python function scores them (or a reward model, or an HTTP endpoint)",
)


class _BackError(Exception):
    """An empty reply to a question that follows from the reply to another one, which is asked again."""


@dataclass(frozen=True)
class Given:
    """What the options of the command say; None where they say nothing.

    Attributes:
        model: folder or hub id.
        prompts: file, folder or hub data set.
        labels: preferences or rankings, likewise.
        judges: of `--judge`.
        reward: function, URL or reward model.
        demonstrations: file, folder or hub data set.
        steps: of PPO.
        settings: values of `--set`.
    """

    model: str | None = None
    prompts: str | None = None
    labels: str | None = None
    judges: Sequence[str] = ()
    reward: str | None = None
    demonstrations: str | None = None
    steps: int | None = None
    settings: Sequence[str] = ()

    def check(self) -> None:
        """Raise `UsageError` if labels come from several sources."""
        options = {"--labels": self.labels, "--judge": self.judges, "--reward": self.reward}
        if len(given := [option for option, value in options.items() if value]) > 1:
            raise UsageError(
                f"{' and '.join(f'`{one}`' for one in given)} exclude each other: completions are judged in one way",
                hint="give one of them; a recipe can combine rewards, see docs/rewards.md",
            )


class Questions:
    """Finds out what a recipe needs: from options, and from a person.

    Args:
        given: the options.
        read: reads a line from a person, and takes the text to show before it; None asks nobody.
    """

    def __init__(self, given: Given, read: Callable[[str], str] | None) -> None:
        given.check()
        self._given, self._read_line = given, read
        self._settings = list(given.settings)
        self._number = 0

    def draft(self) -> Draft:
        """Return what to write; raises an `RLHFError` where nobody can be asked again."""
        given = self._given
        model = self._find(
            given.model, "Which model? A folder, or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct", self._model
        )
        prompts = self._find(
            given.prompts,
            "Which prompts? A file (.txt with one per line, .jsonl, .csv, ...), a folder or a hub data set",
            lambda source: self._prompts(source, model),
        )
        demonstrations = self._demonstrations(model, prompts)
        labels = self._labels(model, prompts)
        steps = self._steps()
        return Draft(model, prompts, labels, steps, demonstrations, tuple(self._settings))

    # What is found out

    def _model(self, path: str) -> ModelFacts:
        with spinner("reading its files ..."):
            found = inspect_model(path)
        self._found(found.described)
        return found

    def _prompts(self, source: str, model: ModelFacts) -> PromptFacts:
        with spinner("reading and tokenizing them ..."):
            found = inspect_prompts(source, model, self._data(model))
        for line in found.described:
            self._found(line)
        return found

    def _demonstrations(self, model: ModelFacts, prompts: PromptFacts) -> DemonstrationFacts | None:
        """Those of the option; for a model that only continues text, those among the prompts."""
        source = self._given.demonstrations
        if source is None and model.continues_text and prompts.has_completions:
            source = prompts.source
            self._found("the completions in it are used as demonstrations, since the model has no chat template")
        elif source is None and prompts.has_completions:
            self._found(f"the completions in it are not used: `--demonstrations {prompts.source}` trains on them first")
        if source is None:
            if model.continues_text:
                warn(
                    "the model has no chat template: it continues text and may not reply. Take its instruction-tuned "
                    "version, or give `--demonstrations FILE`"
                )
            return None
        found = inspect_demonstrations(source, model, self._data(model))
        self._found(found.described)
        return found

    def _labels(self, model: ModelFacts, prompts: PromptFacts) -> LabelChoice:
        given = self._given
        if given.labels is not None:
            return self._preferences(given.labels, model)
        if given.judges:
            return self._judges(given.judges, model)
        if given.reward is not None:
            return self._chosen(label_choice.reward(given.reward, model, prompts))
        if self._read_line is None:
            return self._people(model)
        options = "".join(f"\n  {number}  {text}" for number, text in enumerate(_SOURCES, 1))
        text = f"Who says which completions are better?{options}"
        default = "2" if prompts.has_rankings else "1"
        return self._find(None, text, lambda reply: self._label_source(reply, model, prompts), default)

    def _label_source(self, reply: str, model: ModelFacts, prompts: PromptFacts) -> LabelChoice:
        """Ask what the chosen source needs to know."""
        if reply == "4":
            text = "Which function? FILE.py:NAME, such as my_reward.py:score; docs/rewards.md shows one"
            return self._follow(text, lambda one: self._chosen(label_choice.reward(one, model, prompts)))
        if reply not in ("1", "2", "3"):
            raise UsageError(f"`{reply}` is not one of the numbers 1 to {len(_SOURCES)}")
        if reply == "1":
            return self._people(model)
        check_role(model.path, "start of a reward model")
        if reply == "2":
            default = prompts.source if prompts.has_rankings else ""
            text = "Which file? Many layouts of JSON, CSV and Parquet are read: docs/label-formats.md"
            return self._follow(text, lambda one: self._preferences(one, model), default)
        text = "Which model? A folder, a hub id, or NAME@http://HOST/v1 of an OpenAI-compatible endpoint"
        return self._follow(text, lambda one: self._judges([one], model))

    def _people(self, model: ModelFacts) -> LabelChoice:
        check_role(model.path, "start of a reward model")
        return self._chosen(label_choice.people())

    def _preferences(self, source: str, model: ModelFacts) -> LabelChoice:
        check_role(model.path, "start of a reward model")
        return self._chosen(label_choice.preferences(source, model, self._data(model)))

    def _judges(self, names: Sequence[str], model: ModelFacts) -> LabelChoice:
        check_role(model.path, "start of a reward model")
        return self._chosen(label_choice.judges(names))

    def _steps(self) -> int:
        if self._given.steps is not None:
            return self._given.steps
        if self._read_line is None:
            return FULL_STEPS
        text = f"How many steps of PPO? {SHORT_STEPS} for a first look, {FULL_STEPS} for a full run"
        return self._find(None, text, _whole_number, str(SHORT_STEPS))

    def _data(self, model: ModelFacts) -> DataSettings:
        """Settings of `data`: of the options, and those that the model needs."""
        ours = [setting for setting in self._settings if setting.startswith("data.")]
        return load_recipe(None, ours).recipe.data.model_copy(update=dict(model.settings))

    def _chosen(self, found: LabelChoice) -> LabelChoice:
        self._found(found.described)
        return found

    # Asking

    def _find(self, value: str | None, text: str, inspect: Callable[[str], T], default: str = "") -> T:
        """Inspect what an option gave; without one, ask a numbered question."""
        if value is not None:
            return inspect(value)
        self._number += 1
        return self._ask(f"{self._number}. {text}", inspect, default)

    def _follow(self, text: str, inspect: Callable[[str], T], default: str = "") -> T:
        """Ask what follows from a reply; an empty reply goes back, unless there is a default."""
        return self._ask(
            text if default else f"{text} (Enter alone goes back)", inspect, default, goes_back=not default
        )

    def _ask(self, text: str, inspect: Callable[[str], T], default: str = "", *, goes_back: bool = False) -> T:
        """Ask until a reply passes its inspection; raises `_BackError` on an empty reply that goes back."""
        if self._read_line is None:
            raise UsageError("an answer is missing, and there is no terminal to ask for it")
        console.print(f"\n{text}", markup=False, style="bold")
        reply = ""
        while True:
            reply = reply or self._reply(default, goes_back=goes_back)
            before = list(self._settings)
            try:
                return inspect(self._take_settings(reply))
            except RLHFError as error:
                self._settings = before
                reply = self._after(error, reply)
            except _BackError:
                console.print(f"\n{text}", markup=False, style="bold")
                reply = ""

    def _reply(self, default: str, *, goes_back: bool) -> str:
        assert self._read_line is not None
        while not (reply := self._read_line(f"[{default}] > " if default else "> ").strip() or default):
            if goes_back:
                raise _BackError
            say("  an answer is needed; Ctrl-C leaves, and writes nothing")
        return reply

    def _after(self, error: RLHFError, reply: str) -> str:
        """Show why a reply cannot be used; returns the reply with the setting that helps, if the person agrees."""
        assert self._read_line is not None
        problems = "\n  ".join(error.problems or [error.message])
        console.print(f"[yellow]  cannot be used:[/yellow] {escape(problems)}")  # at once, so that it wraps at words
        if error.hint is None:
            return ""
        if (offered := _OFFERED.search(error.hint)) and not _PLACEHOLDER.search(offered[1]):
            say(f"  {offered[1]} would read it.")
            if self._read_line("  Use this setting? [Y/n] > ").strip().lower() in ("", "y", "yes"):
                name = reply if " --set " in reply else shlex.quote(reply)
                return f"{name} --set {shlex.quote(offered[1])}"
            return ""
        say(f"  {error.hint}")
        if "--set" in error.hint:
            say("  (such a setting can be written after the name)")
        return ""

    def _take_settings(self, reply: str) -> str:
        """Keep the settings that are written behind a name, as `prefs.csv --set data.max_skip=0.1`; return the name."""
        if " --set " not in reply:
            return _unquoted(reply)
        try:
            name, *rest = shlex.split(reply)
        except ValueError as error:
            raise UsageError(f"`{reply}`: {error}") from error
        options, values = rest[::2], rest[1::2]
        if set(options) != {"--set"} or len(options) != len(values):
            raise UsageError(
                f"`{reply}`: expected a name and settings", hint="write NAME --set 'SECTION.SETTING=VALUE'"
            )
        self._settings += values
        return name

    def _found(self, text: str) -> None:
        console.print(f"  {text}", markup=False, style="green")


def _unquoted(reply: str) -> str:
    """The file that a reply names as it is written in a shell, as where a window puts it: quoted, or with `\\ `."""
    if Path(reply).expanduser().exists():
        return reply
    try:
        words = shlex.split(reply)
    except ValueError:
        return reply
    return words[0] if len(words) == 1 else reply


def _whole_number(reply: str) -> int:
    if not reply.isdecimal() or int(reply) < 1:
        raise UsageError(f"`{reply}` is not a number of steps")
    return int(reply)


def line_reader() -> Callable[[str], str]:
    """Return what reads a line from a terminal; Tab completes names of files where the system has readline."""
    try:
        import readline
    except ImportError:  # Windows
        return input

    def complete(text: str, state: int) -> str | None:
        names = _file_names(text)
        return names[state] if state < len(names) else None

    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete)
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    return input


def _file_names(beginning: str) -> list[str]:
    """The files and folders whose path begins so; folders end with a slash."""
    folder, slash, name = beginning.rpartition("/")
    here = Path(f"{folder}{slash}").expanduser()
    try:
        entries = sorted(entry for entry in here.iterdir() if entry.name.startswith(name))
    except OSError:
        return []
    return [f"{folder}{slash}{entry.name}{'/' if entry.is_dir() else ''}" for entry in entries]
