"""Settings of which answers are worth a label."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_cli.recipe.base import Count, Names, Section


class ChooseSettings(Section):
    """Active choice: label the prompts and answers that a reward model would learn most from. Off unless given."""

    by: Literal["random", "uncertainty", "disagreement"]
    """`uncertainty`: where one reward model's preference is nearest to 1/2. `disagreement`: where the preferences of
    several reward models differ most (standard deviation). `random` is what both have to beat."""
    prompts: Count
    """How many prompts are labelled, of all."""
    completions: Annotated[int, Field(ge=2, le=16)] | None = None
    """How many of a prompt's answers are labelled, those that the choice is about; null is all of them."""
    reward_models: Annotated[list[str], Names("model")] = Field(default_factory=list)
    """Folders or hub ids of the reward models to ask: one for `uncertainty`, two or more for `disagreement`."""

    @model_validator(mode="after")
    def _enough_models(self) -> Self:
        count = len(self.reward_models)
        if self.by == "random" and count:
            raise ValueError("`reward_models` has no effect with `by: random`")
        if self.by == "uncertainty" and count != 1:
            raise ValueError(f"`by: uncertainty` asks one reward model; got {count}")
        if self.by == "disagreement" and count < 2:
            raise ValueError(f"`by: disagreement` asks at least two reward models; got {count}")
        if len(set(self.reward_models)) < count:
            raise ValueError("the same reward model stands there twice, and agrees with itself")
        return self
