"""What every recipe section shares: strict, frozen, documented by the docstring under each field."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, values are finite and of their own type, nothing changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def changed(self, *names: str) -> list[str]:
        """Those of these settings that differ from their defaults: what `recipe show` writes out means nothing yet."""
        return [
            name
            for name in names
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)
        ]

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any, info: ValidationInfo) -> Any:
        """`1e3` is a whole number to a person, and a float to YAML."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        wants_whole = any(part is int or int in get_args(part) for part in (annotation, *get_args(annotation)))
        return int(value) if wants_whole and isinstance(value, float) and value.is_integer() else value


class StageSection(Section):
    """The section of a stage."""

    @property
    def loads_model(self) -> bool:
        """Whether the stage loads any model into this process, so that the settings of `model` change its result."""
        return True


@dataclass(frozen=True)
class Names:
    """Marks a setting that names something outside the recipe; relative paths are looked up for it.

    Attributes:
        what: a model (folder or hub id), data (file, folder or hub data set), a text file, a Python function
            (`file.py:function`), or a saved critic's folder, beside the words that name other starts.
    """

    what: Literal["model", "data", "file", "function", "critic"]

    CRITIC_WORDS: ClassVar = ("auto", "reward-model", "policy")
    """Values of a critic's start that are words and name no folder."""

    def leads_out(self, value: Any) -> bool:
        """Whether a value names something outside the recipe, so that its content counts; a word counts itself."""
        return not (self.what == "critic" and value in self.CRITIC_WORDS)


@dataclass(frozen=True)
class EffortOnly:
    """Marks a setting that changes memory, speed or display, never what a stage learns: it may change at any time."""


def _check_address(url: str | None) -> str | None:
    if url is not None and ("?" in url or "#" in url):
        # What was typed is not repeated: people put keys here.
        raise ValueError(
            "expected an address without a query (`?...`) and a fragment (`#...`), which would end up in files; a "
            "token goes into an environment variable that `token_env` names"
        )
    if url is not None and not url.startswith(("http://", "https://")):
        raise ValueError(f"expected an address that begins with http:// or https://; got `{url}`")
    return url


def _check_variable(name: str | None) -> str | None:
    # What was typed is not repeated: people put the token itself here.
    if name is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("expected the name of an environment variable, such as REWARD_TOKEN, not a token")
    return name


Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]
Effort = Annotated[Count, EffortOnly()]
EffortFlag = Annotated[bool, EffortOnly()]
ModelName = Annotated[str | None, Names("model")]
DataName = Annotated[str | None, Names("data")]
FileName = Annotated[str | None, Names("file")]
FunctionName = Annotated[str | None, Names("function")]
Address = Annotated[str | None, AfterValidator(_check_address)]
VariableName = Annotated[str | None, AfterValidator(_check_variable)]
