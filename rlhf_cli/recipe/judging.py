"""Settings of labelling by language models."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_cli.recipe.base import (
    Address,
    Count,
    DataName,
    Effort,
    EffortOnly,
    FileName,
    ModelName,
    NonNegative,
    Positive,
    Section,
    Share,
    VariableName,
)


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
    """Rankings or preferences by people: the judge's agreement with them is measured before anything is labelled."""
    floor: Share | None = None
    """Least agreement with `calibration` (share of its untied pairs, a tie counting 1/2) below which nothing is
    labelled; null only reports it."""
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
