"""Settings of judges: language models that compare completions, in `label` and `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_cli.errors import UsageError
from rlhf_cli.settings.base import (
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
    """Folder or hub id of a causal language model. Its verdict compares P(A) and P(B) of the next token."""
    url: Address = None
    """Base URL of an endpoint with `/chat/completions`, such as http://localhost:8000/v1."""
    name: str | None = None
    """Name of the model at the endpoint."""
    token_env: VariableName = None
    """Environment variable that holds the bearer token for `url`."""
    timeout: Annotated[Positive, EffortOnly()] = 60.0
    """Timeout of one request to `url`, in seconds."""
    retries: Annotated[int, Field(ge=0), EffortOnly()] = 5
    """Retries after a temporary failure of a request to `url`."""
    concurrency: Effort = 8
    """Concurrent requests to `url`."""
    prompt_price: Annotated[NonNegative, EffortOnly()] = 0.0
    """Price of a million prompt tokens, in the currency of `judge.max_cost`."""
    completion_price: Annotated[NonNegative, EffortOnly()] = 0.0
    """Price of a million completion tokens."""
    max_new_tokens: Count = 512
    """Maximum length of an endpoint's reply, including its reasons, in tokens."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.model is None) == (self.url is None):
            raise ValueError("a judge needs either a `model` or a `url`")
        if (self.url is None) != (self.name is None):
            raise ValueError("`url` needs `name`, and `name` needs `url`: the endpoint must know which model to use")
        if self.url is None:
            for setting in self.changed("token_env", "timeout", "retries", "concurrency", "max_new_tokens"):
                raise ValueError(f"`{setting}` has no effect without `url`")
            if self.prompt_price or self.completion_price:
                raise ValueError("`prompt_price` and `completion_price` have no effect without `url`")
        return self


class JudgeSettings(Section):
    """Rankings by language models (Zheng et al. 2023, arXiv:2306.05685), with measures of their reliability."""

    panel: Annotated[list[JudgeModelSettings], Field(min_length=1)]
    """The judges. Every vote is stored; the majority decides."""
    rubric: str = "Prefer the answer that is more helpful, honest and harmless. Length alone is not a merit."
    """Instructions for the judges: what makes a completion better."""
    method: Literal["pairs", "listwise"] = "pairs"
    """How K completions are compared: `pairs` asks one question per pair (K(K-1)/2 questions); `listwise` asks for the
    whole order in one question and needs a `url`."""
    both_orders: bool = True
    """Ask each question again in reverse order; verdicts that differ count as a tie."""
    max_cost: Annotated[NonNegative | None, EffortOnly()] = None
    """Stop before the verdicts cost more than this; the run can be resumed. Null means no limit."""
    calibration: DataName = None
    """Rankings or preferences by people. Judges are compared with them before they label anything."""
    floor: Share | None = None
    """Minimum agreement with `calibration` (share of its untied pairs; a tie counts 1/2). Below it, labeling does not
    start. Null only reports the agreement."""
    rubric_file: FileName = None
    """Text file that holds the rubric; replaces `rubric`."""

    @model_validator(mode="after")
    def _settings_have_effect(self) -> Self:
        if self.floor is not None and self.calibration is None:
            raise ValueError("`floor` has no effect without `calibration`")
        if self.rubric_file is not None and self.changed("rubric"):
            raise ValueError("`rubric` has no effect together with `rubric_file`")
        if self.method == "listwise" and any(judge.url is None for judge in self.panel):
            raise ValueError("`method: listwise` needs judges with a `url`; use `method: pairs` for local models")
        if self.max_cost is not None and not any(judge.prompt_price or judge.completion_price for judge in self.panel):
            raise ValueError("`max_cost` has no effect unless a judge has a `prompt_price` or `completion_price`")
        return self


def judge_panel(judges: Sequence[str]) -> list[dict[str, str]]:
    """Return the panel as the recipe holds it, from the values of `--judge`; `NAME@http://...` is an endpoint.

    Raises:
        UsageError: a URL has no scheme.
    """
    panel = []
    for judge in judges:
        name, _, url = judge.partition("@")
        is_endpoint = url.startswith(("http://", "https://"))
        if url and not is_endpoint and (":" in url or url.split("/")[0].count(".")):
            raise UsageError(
                f"`--judge {judge}`: the URL needs `http://` or `https://`", hint=f"write {name}@http://{url}"
            )
        panel.append({"url": url, "name": name} if is_endpoint else {"model": judge})
    return panel
