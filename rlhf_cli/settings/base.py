"""Base classes and field types of recipe sections: strict, frozen, documented by the docstring under each field."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic_core import core_schema

from rlhf_cli.storage import has_password, is_url


class Section(BaseModel):
    """A section of a recipe: immutable; unknown keys, non-finite numbers and values of another type are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def changed(self, *names: str) -> list[str]:
        """Return those of the named settings that differ from their defaults."""
        return [
            name
            for name in names
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)
        ]

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any, info: ValidationInfo) -> Any:
        """Accept `1e3` for a whole number: YAML reads it as a float."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        wants_whole = any(part is int or int in get_args(part) for part in (annotation, *get_args(annotation)))
        return int(value) if wants_whole and isinstance(value, float) and value.is_integer() else value


class StageSection(Section):
    """Base class of a stage's section."""

    @property
    def loads_model(self) -> bool:
        """Whether the stage loads a model into this process; if so, the `model` settings affect its result."""
        return True

    @property
    def divides_model(self) -> bool:
        """Whether one of these models is divided by `model.sharding: fsdp`."""
        return self.loads_model


@dataclass(frozen=True)
class External:
    """Marks a setting that names something outside the recipe; relative paths are resolved.

    Attributes:
        what: "model" (folder or hub id), "data" (file, folder or hub data set), "file" (text file), "function"
            (`file.py:function`), or "critic" (folder of a saved critic, or one of `CRITIC_WORDS`).
    """

    what: Literal["model", "data", "file", "function", "critic"]

    CRITIC_WORDS: ClassVar = ("auto", "reward-model", "policy")
    """Values of `ppo.critic_from` that are keywords, not folders."""

    def applies_to(self, value: Any) -> bool:
        """Whether a value names something outside the recipe rather than being a keyword."""
        return not (self.what == "critic" and value in self.CRITIC_WORDS)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Validate as without this mark, and refuse URLs that contain a secret."""
        return core_schema.no_info_after_validator_function(_check_source, handler(source))


@dataclass(frozen=True)
class EffortOnly:
    """Marks a setting that affects memory, speed or display but not a stage's result: it may change at any time."""


def _check_address(url: str | None) -> str | None:
    if url is not None and ("?" in url or "#" in url):
        # The value is not repeated in the message: it may contain a key.
        raise ValueError(
            "expected a URL without a query (`?...`) or fragment (`#...`), which would be written to files; put a "
            "token into an environment variable and name it with `token_env`"
        )
    if url is not None and not url.startswith(("http://", "https://")):
        raise ValueError(f"expected a URL that begins with http:// or https://; got `{url}`")
    return url


def _check_folder_url(url: str | None) -> str | None:
    is_folder = url is None or (re.fullmatch(r"(?!http)[a-z][a-z0-9+.-]*://[^?#]+", url) and not has_password(url))
    if not is_folder:
        # The value is not repeated in the message: it may contain a password.
        raise ValueError(
            "expected the URL of a folder that can be written, without a password, such as s3://bucket/runs/mine, "
            "gs://... or file:///mnt/runs/mine"
        )
    return url


def _check_source(value: Any) -> Any:
    for name in value if isinstance(value, list) else [value]:
        if name is not None and is_url(name) and ("?" in name or has_password(name)):
            # The value is not repeated in the message: it may be signed.
            raise ValueError(
                "expected a URL without a password or a query (`?...`), since URLs are written to files; download what "
                "a signed URL has, for example with curl, and give its path"
            )
    return value


def _check_variable(name: str | None) -> str | None:
    # The value is not repeated in the message: it may be the token itself.
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
ModelName = Annotated[str | None, External("model")]
DataName = Annotated[str | None, External("data")]
FileName = Annotated[str | None, External("file")]
FunctionName = Annotated[str | None, External("function")]
Address = Annotated[str | None, AfterValidator(_check_address)]
FolderURL = Annotated[str | None, AfterValidator(_check_folder_url), EffortOnly()]
VariableName = Annotated[str | None, AfterValidator(_check_variable)]
