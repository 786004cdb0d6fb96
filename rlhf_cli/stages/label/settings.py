"""The `label` section of a recipe: who ranks which completions, and how."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_cli.settings.base import (
    Address,
    Count,
    DataName,
    Effort,
    EffortOnly,
    External,
    FileName,
    FunctionName,
    ModelName,
    NonNegative,
    OpenShare,
    Positive,
    Section,
    Share,
    StageSection,
    VariableName,
)
from rlhf_cli.settings.shared import SamplingSettings

_NEEDED = {"function": "function", "reward-model": "reward_model", "import": "data", "judge": "judge"}
_OF_SAMPLING = ("model", "prompts", "completions_per_prompt", "sampling")


class ActiveLearningSettings(Section):
    """Active choice: label the prompts and answers that a reward model would learn most from. Off unless given."""

    by: Literal["random", "uncertainty", "disagreement"]
    """`uncertainty`: where one reward model's preference is nearest to 1/2. `disagreement`: where the preferences of
    several reward models differ most (standard deviation). `random` is what both have to beat."""
    prompts: Count
    """How many prompts are labeled, of all."""
    completions: Annotated[int, Field(ge=2, le=16)] | None = None
    """How many of a prompt's answers are labeled, those that the choice is about; null is all of them."""
    reward_models: Annotated[list[str], External("model")] = Field(default_factory=list)
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
    """Text or Markdown file that tells labelers how to decide; every label keeps the hash of what was shown."""
    repeat_share: OpenShare = 0.05
    """Share of what a person is shown that they labeled before, in another order and without being told: how far they
    agree with themselves."""
    gold: DataName = None
    """Ranking or preference records whose order is known, shown among the others: who pays attention."""
    gold_share: OpenShare = 0.05
    """Share of what a person is shown that is from `gold`."""
    set_aside_after: Count = 1
    """A prompt that so many people skipped or flagged is asked of nobody else; labels that it has are kept."""
    enough: Annotated[Share, EffortOnly()] = 1.0
    """The pipeline goes on when this share of the prompts is done (labeled by `overlap` people or set aside)."""
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


class JudgeModelSettings(Section):
    """One judge: a local Hugging Face model (`model`), or an OpenAI-compatible endpoint (`url` and `name`)."""

    model: ModelName = None
    """Folder or hub id of a causal language model. Its verdict is P(A) against P(B), from its next-token logits."""
    url: Address = None
    """Base address of an endpoint with `/chat/completions`, such as http://localhost:8000/v1."""
    name: str | None = None
    """What the endpoint calls its model."""
    token_env: VariableName = None
    """Environment variable whose value is sent to `url` as a bearer token."""
    timeout: Annotated[Positive, EffortOnly()] = 60.0
    """Seconds for one request to `url`."""
    retries: Annotated[int, Field(ge=0), EffortOnly()] = 5
    """Further attempts at a request to `url` that failed in a way that may pass."""
    concurrency: Effort = 8
    """Requests to `url` in flight at once."""
    prompt_price: Annotated[NonNegative, EffortOnly()] = 0.0
    """What a million prompt tokens cost, in the currency of `judge.max_cost`."""
    completion_price: Annotated[NonNegative, EffortOnly()] = 0.0
    """What a million completion tokens cost."""
    max_new_tokens: Count = 512
    """Longest verdict of an endpoint, its reasons included, in tokens."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.model is None) == (self.url is None):
            raise ValueError("a judge is either a `model` or a `url`")
        if (self.url is None) != (self.name is None):
            raise ValueError("`url` and `name` go together: the endpoint has to be told which model to ask")
        if self.url is None:
            for setting in self.changed("token_env", "timeout", "retries", "concurrency", "max_new_tokens"):
                raise ValueError(f"`{setting}` has no effect without `url`")
            if self.prompt_price or self.completion_price:
                raise ValueError("a local model has no price")
        return self


class JudgeSettings(Section):
    """Rankings by language models (Zheng et al. 2023, arXiv:2306.05685), with what is known against trusting them."""

    panel: Annotated[list[JudgeModelSettings], Field(min_length=1)]
    """The judges. Each one's votes are kept; their majority decides."""
    rubric: str = "Prefer the answer that is more helpful, honest and harmless. Length alone is no merit."
    """What the judge is told to look for."""
    method: Literal["pairs", "listwise"] = "pairs"
    """How K answers are compared: every pair on its own (K(K-1)/2 questions), or all in one question, which asks a
    judge to write the whole order and needs a `url`."""
    both_orders: bool = True
    """Ask twice, the second time in reverse order; verdicts that differ count as a tie."""
    max_cost: Annotated[NonNegative | None, EffortOnly()] = None
    """Stop, resumably, before verdicts cost more than this; null is without bound."""
    calibration: DataName = None
    """Rankings or preferences by people: the judge's agreement with them is measured before anything is labeled."""
    floor: Share | None = None
    """Least agreement with `calibration` (share of its untied pairs, a tie counting 1/2) below which nothing is
    labeled; null only reports it."""
    rubric_file: FileName = None
    """Text file with the rubric, in place of `rubric`."""

    @model_validator(mode="after")
    def _settings_have_effect(self) -> Self:
        if self.floor is not None and self.calibration is None:
            raise ValueError("`floor` has no effect without `calibration`")
        if self.rubric_file is not None and self.changed("rubric"):
            raise ValueError("`rubric` has no effect beside `rubric_file`")
        if self.method == "listwise" and any(judge.url is None for judge in self.panel):
            raise ValueError("`method: listwise` needs judges that write: give each a `url`, or use `method: pairs`")
        if self.max_cost is not None and not any(judge.prompt_price or judge.completion_price for judge in self.panel):
            raise ValueError("`max_cost` has no effect while no judge has a `prompt_price` or `completion_price`")
        return self


class LabelSettings(StageSection):
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
    choose: ActiveLearningSettings | None = None
    """Which prompts and answers are labeled; null is all of them."""
    human: HumanSettings | None = None
    """How people label, with `by: human`."""
    judge: JudgeSettings | None = None
    """The judges, with `by: judge`."""

    @property
    def samples(self) -> bool:
        """Whether answers are drawn from a model."""
        return self.by != "import" and self.items is None

    @property
    def loads_model(self) -> bool:
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
