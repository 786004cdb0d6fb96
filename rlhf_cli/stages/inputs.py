"""Inputs of stages: the artifact of an earlier stage, a setting that replaces it, or a file of the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from rlhf_cli.data.records import Kind
from rlhf_cli.errors import UsageError
from rlhf_cli.models.role import ModelRole
from rlhf_cli.quoting import word
from rlhf_cli.settings.run import RunSettings

InputKind = Literal["artifact", "model", "critic", "data", "file", "function", "endpoint", "build"]


@dataclass(frozen=True)
class Input:
    """One input of a stage.

    Attributes:
        kind: determines how the input is checked and hashed.
        source: folder, file, hub id, `file.py:function`, URL, or "build".
        setting: the setting that names it, for messages; empty for an artifact.
        upstream: the stage that writes it, for an artifact.
        records: kind of records, for data.
        matters: whether the stage's result depends on its content. False for a URL, which counts as a setting, and for
            the base model in stages that do not read it.
        token_env: environment variable that must hold the token of a URL.
        use: "train" for prompts that the policy is trained on, "evaluate" for those that it is evaluated on, all of
            them; None for others, and for those of which the split chooses some.
        role: what a model is used for; None if it is not checked.
        sampled_by: section of the stage that draws completions from a model; None if none does.
    """

    kind: InputKind
    source: str
    setting: str = ""
    upstream: str | None = None
    records: Kind | None = None
    matters: bool = True
    token_env: str | None = None
    use: Literal["train", "evaluate"] | None = None
    role: ModelRole | None = None
    sampled_by: str | None = None

    @property
    def described(self) -> str:
        """Description for messages about its content."""
        if self.upstream is not None:
            return f"the output of `{self.upstream}`"
        return f"the content of `{self.setting}`"


def source_of(given: Input | None) -> str | None:
    """Return the source of an input; None if the input is absent."""
    return None if given is None else given.source


def present(given: Input | None) -> str:
    """Return the source of an input that the stage's settings guarantee."""
    assert given is not None
    return given.source


@dataclass(frozen=True)
class StageInputs:
    """All inputs of a stage. Subclasses add fields of type `Input`, `Input | None` or `tuple[Input, ...]`.

    Attributes:
        base: the model before any training, if the recipe names one.
        attention: the user's attention function, if the recipe names one.
    """

    base: Input | None
    attention: Input | None

    def by_name(self) -> dict[str, Input]:
        """Return all inputs by field name; members of a tuple are `field.0`, `field.1`."""
        found: dict[str, Input] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Input):
                found[one.name] = value
            elif isinstance(value, tuple):
                found |= {f"{one.name}.{number}": member for number, member in enumerate(value)}
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain values, to send to other processes of the run."""
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
    """The artifacts of a run, as `InputFinder` sees them."""

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        ...

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage's artifact, which may not exist yet."""
        ...

    def has(self, stage: str) -> bool:
        """Whether the artifact exists or will be written before it is read."""
        ...

    def writes(self, stage: str) -> str:
        """Return what the stage's artifact is, such as "reward model"."""
        ...


class InputFinder:
    """Finds the inputs of one stage, by rules shared by all stages.

    Args:
        stage: name of the stage.
        recipe: settings with resolved paths.
        artifacts: artifacts of the run.
    """

    def __init__(self, stage: str, recipe: RunSettings, artifacts: Artifacts) -> None:
        self._stage, self._recipe, self.artifacts = stage, recipe, artifacts
        self._section = stage.replace("-", "_")

    def shared(self, *, trains_base: bool = False) -> dict[str, Any]:
        """Return the fields of `StageInputs`.

        Args:
            trains_base: whether the stage reads the base model itself.
        """
        from rlhf_cli.settings.shared import is_own_function

        model = self._recipe.model
        base = None
        if model.path is not None:
            base = Input("model", model.path, "model.path", matters=trains_base, role="policy")
        elif model.build is not None:
            base = Input("build", "build", "model.build", matters=trains_base)
        attention = None
        if getattr(self._recipe, self._section).loads_model and is_own_function(model.attention):
            attention = Input("function", model.attention, "model.attention")
        return {"base": base, "attention": attention}

    def named(
        self,
        kind: InputKind,
        source: str | None,
        setting: str,
        records: Kind | None = None,
        role: ModelRole | None = None,
    ) -> Input | None:
        """Return the input that a setting names; None if it is null. `setting` is relative to the stage's section."""
        if source is None:
            return None
        sampled_by = self._section if role == "policy" else None
        return Input(kind, source, f"{self._section}.{setting}", records=records, role=role, sampled_by=sampled_by)

    def policy(self, setting: str, given: str | None, role: ModelRole = "policy") -> Input:
        """Return the SFT model: the one a setting names, else the output of `sft`, else the base model."""
        sampled_by = self._section if role == "policy" else None
        if given is not None:
            return Input("model", given, f"{self._section}.{setting}", role=role, sampled_by=sampled_by)
        if self._recipe.value("sft") is None and self._recipe.model.path is not None:
            return Input("model", self._recipe.model.path, "model.path", role=role, sampled_by=sampled_by)
        return replace(self.artifact("sft", setting), role=role, sampled_by=sampled_by)

    def artifact(self, writer: str, setting: str, *, file: str = "", also: str = "") -> Input:
        """Return the artifact of an earlier stage.

        Args:
            writer: the earlier stage.
            setting: the setting of this stage that can name another source.
            file: file inside the artifact, if only that is read.
            also: an alternative to add to the hint.

        Raises:
            UsageError: the artifact does not exist, and no selected stage writes it.
        """
        if not self.artifacts.has(writer):
            raise self.missing(writer, setting, also=also)
        return Input("artifact", str(self.artifacts.folder(writer) / file), upstream=writer)

    def missing(self, writer: str, setting: str, *, also: str = "") -> UsageError:
        """Return the error for an artifact that does not exist."""
        run_dir = self.artifacts.run_dir
        return UsageError(
            f"no {self.artifacts.writes(writer)} in {run_dir}: `{self._stage}` reads the output of `{writer}`",
            hint=f"run `rlhf {writer}` with `--run-dir {word(run_dir)}` first, or specify one with "
            f"`--set {self._section}.{setting}=PATH`{also}",
        )

    def prompts(self, own: str | None) -> Input:
        """Return the prompts: the stage's own setting, else `data.prompts`; raises `UsageError` if both are null."""
        section = self._section
        if own is not None:
            return Input("data", own, f"{section}.prompts", records="prompt")
        shared = self._recipe.data.prompts
        if shared is None:
            raise UsageError(
                f"no prompts: `{section}` needs `{section}.prompts` or `data.prompts`",
                hint="specify a file, folder or hub data set with `--set data.prompts=PATH`",
            )
        return Input("data", shared, "data.prompts", records="prompt")
