"""Settings of labelling by people."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_cli.recipe.base import Count, DataName, EffortOnly, FileName, OpenShare, Section, Share


class HumanSettings(Section):
    """Rankings by people, at the keyboard or in a browser."""

    overlap: Count = 1
    """Labels that each prompt's answers need, every one by another person. Agreement is measured where it is 2 or
    more."""
    criteria: list[str] = Field(default_factory=list)
    """Marks from 1 (worst) to 5 for each answer beside the ranking, by name, such as `[helpful, honest, harmless]`."""
    strengths: bool = False
    """With two answers a prompt: ask how much better the better one is, in four degrees (Llama 2, section 3.2.1), which
    become the record's `margin`."""
    guidelines: FileName = None
    """Text or Markdown file that tells labellers how to decide; every label keeps the hash of what was shown."""
    repeat_share: OpenShare = 0.05
    """Share of what a person is shown that they labelled before, in another order and without being told: how far they
    agree with themselves."""
    gold: DataName = None
    """Ranking or preference records whose order is known, shown among the others: who pays attention."""
    gold_share: OpenShare = 0.05
    """Share of what a person is shown that is from `gold`."""
    set_aside_after: Count = 1
    """A prompt that so many people skipped or flagged is asked of nobody else; labels that it has are kept."""
    enough: Annotated[Share, EffortOnly()] = 1.0
    """The pipeline goes on when this share of the prompts is done (labelled by `overlap` people or set aside)."""
    merge: Literal["individual", "majority", "bradley-terry", "plackett-luce"] = "individual"
    """What the reward model learns from: everyone's rankings, or one ranking a prompt, by majority of pairs or by a
    Bradley-Terry or Plackett-Luce fit. Individual labels are always kept in `labels.jsonl`."""

    @model_validator(mode="after")
    def _gold_has_a_share(self) -> Self:
        if self.gold is None and self.changed("gold_share"):
            raise ValueError("`gold_share` has no effect without `gold`")
        return self

    @field_validator("criteria")
    @classmethod
    def _plain_names(cls, criteria: list[str]) -> list[str]:
        for name in criteria:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9 _-]{0,29}", name):
                raise ValueError(f"expected up to 30 letters, digits, blanks, `_` or `-`; got `{name}`")
        if len({name.lower() for name in criteria}) < len(criteria):
            raise ValueError("the same criterion stands there twice")
        if len(criteria) > 9:
            raise ValueError(f"at most 9 criteria can be marked with keys; got {len(criteria)}")
        return criteria
