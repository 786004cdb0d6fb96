"""The section of one reward. It is declared here, below `rewards/`, because the HTTP reward takes it as it is."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from rlhf_cli.settings.base import Address, Effort, EffortOnly, ModelName, Names, Positive, Section, VariableName


class PPORewardSettings(Section):
    """One reward beside the reward model, with exactly one of `function`, `model` and `url`. All receive text."""

    function: Annotated[str | None, Names("function")] = None
    """`package.module:function` or `file.py:function`; see `label.function`."""
    model: ModelName = None
    """Another reward model: folder or hub id of one of ours, or of any transformers classifier with one label."""
    url: Address = None
    """An HTTP endpoint; docs/rewards.md describes request and response."""
    weight: float = 1.0
    """Factor on this reward before rewards are combined; not 0."""
    token_env: VariableName = None
    """Environment variable whose value is sent to `url` as a bearer token."""
    timeout: Annotated[Positive, EffortOnly()] = 30.0
    """Seconds per attempt at `url`, from resolving the host to the last byte of the response."""
    retries: Annotated[int, Field(ge=0), EffortOnly()] = 5
    """Retries per request to `url` after a temporary failure."""
    request_size: Effort = 64
    """Completions per request to `url`."""

    @field_validator("weight")
    @classmethod
    def _has_effect(cls, weight: float) -> float:
        if weight == 0.0:
            raise ValueError("a reward with weight 0 has no effect; remove the reward")
        return weight

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name in ("function", "model", "url") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected exactly one of `function`, `model` and `url`; got {' and '.join(given) or 'none'}"
            )
        if self.url is None:
            for name in ("token_env", "timeout", "retries", "request_size"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"`{name}` has no effect without `url`")
        return self
