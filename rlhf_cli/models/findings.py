"""A model of a run with what it is used for, and what checks of it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rlhf_cli.errors import RLHFError
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.role import ModelRole

T = TypeVar("T")


@dataclass(frozen=True)
class ModelUse:
    """A model of a run and what the run does with it.

    Attributes:
        source: where it comes from.
        role: see `ModelRole`.
        template: of plain-text prompts: None, "chat" or text around `{prompt}`; "auto" is the model's own.
        template_kwargs: arguments of the chat template.
        max_new_tokens: longest completion that is drawn from it; None if none is.
    """

    source: ModelSource
    role: ModelRole
    template: str | None = "auto"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None


@dataclass
class Findings:
    """What the checks of a model found.

    Attributes:
        errors: a stage would fail or be wrong.
        warnings: a stage can go on.
    """

    errors: list[RLHFError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def attempt(self, check: Callable[..., T], *arguments: Any) -> T | None:
        """Return what a check returns; None if it raises, and then keep its error."""
        try:
            return check(*arguments)
        except RLHFError as error:
            if all(error.message != known.message for known in self.errors):
                self.errors.append(error)
            return None
