"""How comparisons are read that are written as completion columns and a verdict."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rlhf_cli.settings.base import Section

Reading = Literal["winner", "strength", "scores", "ranks", "order"]


def _as_text(values: Any) -> Any:
    """Write YAML's numbers and booleans as text: `{1: a}` is `{"1": "a"}`, `{true: a}` is `{"true": "a"}`."""
    if not isinstance(values, dict):
        return values
    return {_scalar(key): _scalar(value) for key, value in values.items()}


def _scalar(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


class ComparisonSettings(Section):
    """Comparisons stored as two or more completion columns and a verdict. A name may be a path: `question.full_text` is
    a field of an object, `answers[].text` is that field of each object in a list."""

    completions: Annotated[list[str], Field(min_length=1)]
    """Columns of the completions, or one path of a list of them."""
    verdict: str | list[str] | None = None
    """Column of the verdict, or one column of scores or ranks per completion. Records without a verdict are skipped and
    counted."""
    read_as: Reading = "winner"
    """What the verdict is. `winner`: the name of a completion column, its letter, number or side, or `tie`. `strength`:
    a number, negative if the first completion is better, 0 for a tie. `scores`: a number per completion, of which the
    highest is best. `ranks`: a number per completion, of which the lowest is best. `order`: there is no verdict, and
    the columns are listed best first."""
    values: Annotated[dict[str, str], BeforeValidator(_as_text)] = Field(default={})
    """With `read_as: winner`, what values of the verdict mean, where they are not self-explanatory:
    `{value: column}`, `{value: number from 0}`,
    `{value: tie}`, or `{value: skip}` for no verdict."""
    prompt: str | None = None
    """Column of the prompt; null is `prompt` or, where the completions are whole conversations, their beginning."""
    annotator: str | None = None
    """Column that identifies the annotator."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.verdict is None) != (self.read_as == "order"):
            raise ValueError("`read_as: order` has no `verdict`; every other way of reading needs one")
        if self.read_as == "order" and len(self.completions) < 2:
            raise ValueError("`read_as: order` needs two or more columns in `completions`")
        if isinstance(self.verdict, list) and self.read_as in ("winner", "strength"):
            raise ValueError("several columns in `verdict` are read as `scores` or `ranks`, one per completion")
        return self
