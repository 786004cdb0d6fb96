"""What stages read: an earlier stage's artifact, the setting that replaces it, or a file of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from rlhf_cli.data.records import Kind
from rlhf_cli.errors import UsageError
from rlhf_cli.settings.run import RunSettings

InputKind = Literal["artifact", "model", "critic", "data", "file", "function", "endpoint", "build"]


@dataclass(frozen=True)
class Input:
    """One thing a stage reads.

    Attributes:
        kind: how it is checked and hashed.
        source: folder, file, hub id, `file.py:function`, URL, or "build".
        setting: the setting that named it, for messages; empty for an artifact.
        upstream: the stage that writes it, for an artifact.
        records: kind of records, for data.
        matters: whether the stage's result depends on its content. A URL counts as the setting that it is, and the base
            model is shown to all stages and read by one.
        token_env: environment variable that must hold the token of a URL.
    """

    kind: InputKind
    source: str
    setting: str = ""
    upstream: str | None = None
    records: Kind | None = None
    matters: bool = True
    token_env: str | None = None

    @property
    def described(self) -> str:
        """What it is, for messages about its content."""
        if self.upstream is not None:
            return f"what `{self.upstream}` wrote"
        return f"the content of `{self.setting}`"


def source_of(given: Input | None) -> str | None:
    """Source of an input that may be absent."""
    return None if given is None else given.source


def present(given: Input | None) -> str:
    """Source of an input that the stage's settings make sure of."""
    assert given is not None
    return given.source


@dataclass(frozen=True)
class StageInputs:
    """Everything a stage reads. A stage's own record adds fields of `Input`, `Input | None` or `tuple[Input, ...]`.

    Attributes:
        base: the model before any training, where the recipe names one.
        attention: the user's own attention function, where the recipe names one.
    """

    base: Input | None
    attention: Input | None

    def by_name(self) -> dict[str, Input]:
        """All inputs by the name of their field; members of a tuple by `field.0`, `field.1`."""
        found: dict[str, Input] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Input):
                found[one.name] = value
            elif isinstance(value, tuple):
                found |= {f"{one.name}.{number}": member for number, member in enumerate(value)}
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values, for other processes of the run."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""

        def restored(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return tuple(Input(**member) for member in value)
            return None if value is None else Input(**value)

        return cls(**{name: restored(value) for name, value in plain.items()})


class Artifacts(Protocol):
    """The artifacts of a run, as far as inputs are concerned."""

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        ...

    def folder(self, stage: str) -> Path:
        """Where a stage's artifact is or will be."""
        ...

    def has(self, stage: str) -> bool:
        """Whether the artifact exists, or is written before it is read."""
        ...

    def writes(self, stage: str) -> str:
        """What the stage's artifact is."""
        ...


class InputFinder:
    """Finds the inputs of one stage; the rules that stages share stand here once.

    Args:
        stage: name of the stage.
        recipe: resolved settings.
        artifacts: of the run.
    """

    def __init__(self, stage: str, recipe: RunSettings, artifacts: Artifacts) -> None:
        self._stage, self._recipe, self.artifacts = stage, recipe, artifacts
        self._section = stage.replace("-", "_")

    def shared(self, *, loads_model: bool, trains_base: bool = False) -> dict[str, Any]:
        """The fields of `StageInputs`.

        Args:
            loads_model: whether the stage loads any model, so that a function of the user's may compute its attention.
            trains_base: whether the stage reads the base model itself.
        """
        from rlhf_cli.settings.shared import is_own_function

        model = self._recipe.model
        base = None
        if model.path is not None:
            base = Input("model", model.path, "model.path", matters=trains_base)
        elif model.build is not None:
            base = Input("build", "build", "model.build", matters=trains_base)
        attention = None
        if loads_model and is_own_function(model.attention):
            attention = Input("function", model.attention, "model.attention")
        return {"base": base, "attention": attention}

    def named(self, kind: InputKind, source: str | None, setting: str, records: Kind | None = None) -> Input | None:
        """What a setting names; None where it names nothing. `setting` is relative to the stage's section."""
        if source is None:
            return None
        return Input(kind, source, f"{self._section}.{setting}", records=records)

    def policy(self, setting: str, given: str | None) -> Input:
        """The SFT model: what a setting names, else what `sft` writes, else the base model where no `sft` runs."""
        if given is not None:
            return Input("model", given, f"{self._section}.{setting}")
        if self._recipe.value("sft") is None and self._recipe.model.path is not None:
            return Input("model", self._recipe.model.path, "model.path")
        return self.artifact("sft", setting)

    def artifact(self, writer: str, setting: str, *, file: str = "", also: str = "") -> Input:
        """What an earlier stage writes.

        Args:
            writer: the stage.
            setting: of this stage, that names something else instead.
            file: inside the artifact, if not all of it is read.
            also: a further way out, for the hint.

        Raises:
            UsageError: the artifact does not exist, and no chosen stage writes it.
        """
        if not self.artifacts.has(writer):
            raise self.missing(writer, setting, also=also)
        return Input("artifact", str(self.artifacts.folder(writer) / file), upstream=writer)

    def missing(self, writer: str, setting: str, *, also: str = "") -> UsageError:
        """The error for an artifact that does not exist."""
        run_dir = self.artifacts.run_dir
        return UsageError(
            f"no {self.artifacts.writes(writer)} in {run_dir}: `{self._stage}` reads what `{writer}` writes",
            hint=f"run `rlhf {writer} --run-dir {run_dir}` first, or name one with "
            f"`--set {self._section}.{setting}=PATH`{also}",
        )

    def prompts(self, own: str | None) -> Input:
        """Prompt records: the stage's own setting, else `data.prompts`; raises `UsageError` where there are none."""
        section = self._section
        if own is not None:
            return Input("data", own, f"{section}.prompts", records="prompt")
        shared = self._recipe.data.prompts
        if shared is None:
            raise UsageError(
                f"no prompts: `{section}` needs `{section}.prompts` or `data.prompts`",
                hint="name a file, folder or hub data set with `--set data.prompts=PATH`",
            )
        return Input("data", shared, "data.prompts", records="prompt")
