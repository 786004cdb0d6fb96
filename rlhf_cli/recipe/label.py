"""The `label` section: who ranks which answers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_cli.recipe.base import DataName, FunctionName, ModelName, NonNegative, Section
from rlhf_cli.recipe.choosing import ChooseSettings
from rlhf_cli.recipe.human import HumanSettings
from rlhf_cli.recipe.judging import JudgeSettings
from rlhf_cli.recipe.shared import SamplingSettings

_NEEDED = {"function": "function", "reward-model": "reward_model", "import": "data", "judge": "judge"}
_OF_SAMPLING = ("model", "prompts", "completions_per_prompt", "sampling")


class LabelSettings(Section):
    """Sampling K answers a prompt and ranking them, or bringing in rankings that people already made."""

    by: Literal["function", "reward-model", "human", "judge", "import"]
    """Who ranks: a `function`, a `reward-model`, people (`human`), language models (`judge`), or people already did
    (`import`)."""
    model: ModelName = None
    """Policy to sample from; null is what `sft` wrote."""
    prompts: DataName = None
    """Prompt records; null is `data.prompts`."""
    items: DataName = None
    """Answers to rank, in place of sampled ones: records with `prompt` and `completions`, or preferences or rankings,
    whose own order is then known and only compared with."""
    data: DataName = None
    """Ranking or preference records to bring in, with `by: import`."""
    function: FunctionName = None
    """`package.module:function` or `file.py:function`, called with a list of prompts and a list of completions; returns
    one float each, higher is better. It is code that runs with your rights."""
    reward_model: ModelName = None
    """Folder or hub id of a reward model, with `by: reward-model`."""
    completions_per_prompt: Annotated[int, Field(ge=2, le=16)] = 4
    """K. InstructGPT used 4 to 9."""
    tie_margin: NonNegative = 0.0
    """Scores that differ by at most this much share a tier."""
    sampling: SamplingSettings = SamplingSettings()
    """How the answers are drawn."""
    choose: ChooseSettings | None = None
    """Which prompts and answers are labelled; null is all of them."""
    human: HumanSettings | None = None
    """How people label, with `by: human`."""
    judge: JudgeSettings | None = None
    """The judges, with `by: judge`."""

    @property
    def samples(self) -> bool:
        """Whether answers are drawn from a model."""
        return self.by != "import" and self.items is None

    @property
    def loads_a_model(self) -> bool:
        """Whether any model is loaded into this process."""
        judges = self.judge is not None and any(judge.model is not None for judge in self.judge.panel)
        chooses = self.choose is not None and bool(self.choose.reward_models)
        return self.samples or self.reward_model is not None or judges or chooses

    @model_validator(mode="after")
    def _source_of_labels(self) -> Self:
        needed = _NEEDED.get(self.by)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"`by: {self.by}` needs `{needed}`")
        for other in sorted(set(_NEEDED.values()) - {needed}):
            if getattr(self, other) is not None:
                raise ValueError(f"`{other}` has no effect with `by: {self.by}`")
        if self.by != "human" and self.human is not None:
            raise ValueError(f"`human` has no effect with `by: {self.by}`")
        if self.by in ("human", "judge", "import") and self.tie_margin:
            raise ValueError(f"`tie_margin` has no effect with `by: {self.by}`, which gives no scores")
        return self

    @model_validator(mode="after")
    def _source_of_answers(self) -> Self:
        if self.by == "import":
            for other in ("items", "choose"):
                if getattr(self, other) is not None:
                    raise ValueError(f"`{other}` has no effect with `by: import`, which takes `data` as it is")
        for other in self.changed(*_OF_SAMPLING) if self.items is not None else ():
            raise ValueError(f"`{other}` has no effect beside `items`, which holds the answers already")
        return self

    @model_validator(mode="after")
    def _enough_to_choose_from(self) -> Self:
        if self.choose is not None and self.samples and (self.choose.completions or 0) > self.completions_per_prompt:
            raise ValueError(
                f"`choose.completions: {self.choose.completions}` is more than there are: "
                f"`completions_per_prompt: {self.completions_per_prompt}`"
            )
        return self

    @model_validator(mode="after")
    def _strengths_of_pairs(self) -> Self:
        shown = (self.choose and self.choose.completions) or self.completions_per_prompt
        if self.human is not None and self.human.strengths and self.items is None and shown != 2:
            raise ValueError(f"`human.strengths` is for two answers a prompt; `completions_per_prompt` is {shown}")
        return self
