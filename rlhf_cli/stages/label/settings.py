"""The `label` section of a recipe: who ranks the completions, and how."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_cli.settings.base import (
    Count,
    DataName,
    EffortOnly,
    External,
    FileName,
    FunctionName,
    ModelName,
    NonNegative,
    OpenShare,
    Section,
    Share,
    StageSection,
)
from rlhf_cli.settings.judges import JudgeSettings
from rlhf_cli.settings.shared import StageSamplingSettings

_NEEDED = {"function": "function", "reward-model": "reward_model", "import": "data", "judge": "judge"}
_OF_SAMPLING = ("model", "prompts", "completions_per_prompt", "sampling")


class ActiveLearningSettings(Section):
    """Active learning: label only the prompts and completions a reward model learns most from. Off by default."""

    by: Literal["random", "uncertainty", "disagreement"]
    """Strategy. `uncertainty`: where the preference of one reward model is closest to 1/2. `disagreement`: where the
    preferences of several reward models differ most (standard deviation). `random`: the baseline; completions are
    sampled for the selected prompts only."""
    prompts: Count
    """Number of prompts to label."""
    completions: Annotated[int, Field(ge=2, le=16)] | None = None
    """Completions to label per prompt, selected by the same strategy; null keeps all of them."""
    reward_models: Annotated[list[str], External("model")] = Field(default_factory=list)
    """Folders or hub ids of the reward models: exactly one for `uncertainty`, two or more for `disagreement`."""

    @model_validator(mode="after")
    def _enough_models(self) -> Self:
        count = len(self.reward_models)
        if self.by == "random" and count:
            raise ValueError("`reward_models` has no effect with `by: random`")
        if self.by == "uncertainty" and count != 1:
            raise ValueError(f"`by: uncertainty` needs exactly one reward model; got {count}")
        if self.by == "disagreement" and count < 2:
            raise ValueError(f"`by: disagreement` needs at least two reward models; got {count}")
        if len(set(self.reward_models)) < count:
            raise ValueError("`reward_models` lists the same reward model twice")
        return self


class HumanSettings(Section):
    """Rankings by annotators, in the terminal or in a browser."""

    overlap: Count = 1
    """Annotators per prompt. With 2 or more, agreement between annotators can be measured."""
    criteria: list[str] = Field(default_factory=list)
    """Names of criteria, such as `[helpful, honest, harmless]`. Annotators give each completion a mark from 1 (worst)
    to 5 (best) for each criterion, in addition to the ranking."""
    strengths: bool = False
    """With two completions per prompt: ask how much better the better one is, on four levels (Llama 2, section 3.2.1).
    The answer becomes the record's `margin`."""
    guidelines: FileName = None
    """Text or Markdown file with instructions for annotators; every label stores the hash of the text shown."""
    repeat_share: OpenShare = 0.05
    """Share of an annotator's tasks that are hidden repeats: earlier items in another order, which the annotator is not
    told. They measure how consistent the annotator is."""
    gold: DataName = None
    """Ranking or preference records with a known order, mixed into the tasks to check the annotators."""
    gold_share: OpenShare = 0.05
    """Share of an annotator's tasks that come from `gold`."""
    set_aside_after: Count = 1
    """A prompt is set aside once this many annotators have skipped or flagged it; its labels are kept."""
    enough: Annotated[Share, EffortOnly()] = 1.0
    """Share of the prompts that must be done (labeled by `overlap` annotators, or set aside) before the pipeline
    continues."""
    aggregation: Literal["individual", "majority", "bradley-terry", "plackett-luce"] = "individual"
    """How the rankings of several annotators are combined for the reward model. `individual` keeps all of them; the
    other methods make one ranking per prompt, by majority of pairs or by a Bradley-Terry or Plackett-Luce fit.
    `labels.jsonl` always holds the individual labels."""

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
                raise ValueError(f"expected up to 30 letters, digits, spaces, `_` or `-`; got `{name}`")
        if len({name.lower() for name in criteria}) < len(criteria):
            raise ValueError("the same criterion is listed twice")
        if len(criteria) > 9:
            raise ValueError(f"at most 9 criteria are supported; got {len(criteria)}")
        return criteria


class LabelSettings(StageSection):
    """Sampling K completions per prompt and ranking them, or importing existing rankings."""

    by: Literal["function", "reward-model", "human", "judge", "import"]
    """Who ranks: a `function`, a `reward-model`, annotators (`human`), language models (`judge`), or nobody, because
    existing rankings are imported (`import`)."""
    model: ModelName = None
    """Policy to sample from; null is the output of `sft`."""
    prompts: DataName = None
    """Prompt records; null is `data.prompts`."""
    items: DataName = None
    """Completions to rank instead of sampled ones: records with `prompt` and `completions`, or preferences or rankings.
    If records have a preference or ranking, it is used only for comparison with the new labels."""
    data: DataName = None
    """Ranking or preference records to import, with `by: import`."""
    function: FunctionName = None
    """`package.module:function` or `file.py:function`. It takes a list of prompts and a list of completions and returns
    one float each; higher is better; docs/rewards.md lists what else it may ask for, such as references. The function
    runs with your permissions."""
    reward_model: ModelName = None
    """Folder or hub id of a reward model, with `by: reward-model`."""
    completions_per_prompt: Annotated[int, Field(ge=2, le=16)] = 4
    """K, the number of completions sampled per prompt. InstructGPT used 4 to 9."""
    tie_margin: NonNegative = 0.0
    """Completions whose scores differ by at most this much share a tier: they are tied."""
    sampling: StageSamplingSettings = StageSamplingSettings()
    """How completions are sampled."""
    active_learning: ActiveLearningSettings | None = None
    """Which prompts and completions are labeled; null labels all of them."""
    human: HumanSettings | None = None
    """Labeling by annotators, with `by: human`; null is the same as a section with defaults."""
    judge: JudgeSettings | None = None
    """The judges, with `by: judge`."""

    @property
    def samples(self) -> bool:
        """Whether completions are sampled from a model."""
        return self.by != "import" and self.items is None

    @property
    def selects_first(self) -> bool:
        """Whether prompts are selected before completions are sampled: a random selection needs none."""
        return self.samples and self.active_learning is not None and self.active_learning.by == "random"

    @property
    def samples_for_people(self) -> bool:
        """Whether annotators can label the first completions while others are sampled."""
        selects = self.active_learning is not None and not self.selects_first  # among all completions
        drops = self.active_learning is not None and self.active_learning.completions is not None
        return self.by == "human" and self.samples and not (selects or drops)

    @property
    def loads_model(self) -> bool:
        """Whether this process loads any model."""
        judges = self.judge is not None and any(judge.model is not None for judge in self.judge.panel)
        return self.divides_model or judges

    @property
    def divides_model(self) -> bool:
        """Whether it loads a policy or reward models; judges are whole in every process."""
        selects = self.active_learning is not None and bool(self.active_learning.reward_models)
        return self.samples or self.reward_model is not None or selects

    @model_validator(mode="before")
    @classmethod
    def _people_have_a_section(cls, given: Any) -> Any:
        """Create `human` if it is null: what one sets in it later differs from its defaults, not from nothing."""
        if isinstance(given, dict) and given.get("by") == "human" and given.get("human") is None:
            return {**given, "human": {}}
        return given

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
            raise ValueError(f"`tie_margin` has no effect with `by: {self.by}`, which produces no scores")
        return self

    @model_validator(mode="after")
    def _source_of_completions(self) -> Self:
        if self.by == "import":
            for other in ("items", "active_learning"):
                if getattr(self, other) is not None:
                    raise ValueError(f"`{other}` has no effect with `by: import`, which uses `data` as it is")
        for other in self.changed(*_OF_SAMPLING) if self.items is not None else ():
            raise ValueError(f"`{other}` has no effect together with `items`, which provides the completions")
        return self

    @model_validator(mode="after")
    def _enough_to_select_from(self) -> Self:
        if (
            self.active_learning is not None
            and self.samples
            and (self.active_learning.completions or 0) > self.completions_per_prompt
        ):
            raise ValueError(
                f"`active_learning.completions: {self.active_learning.completions}` exceeds "
                f"`completions_per_prompt: {self.completions_per_prompt}`"
            )
        return self

    @model_validator(mode="after")
    def _strengths_of_pairs(self) -> Self:
        shown = (self.active_learning and self.active_learning.completions) or self.completions_per_prompt
        if self.human is not None and self.human.strengths and self.items is None and shown != 2:
            raise ValueError(f"`human.strengths` needs two completions per prompt; `completions_per_prompt` is {shown}")
        return self
