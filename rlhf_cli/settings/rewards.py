"""The section of one reward. It is declared here, below `rewards/`, because the HTTP reward uses it directly."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_cli.settings.base import Address, Effort, EffortOnly, External, ModelName, Positive, Section, VariableName


class PPORewardSettings(Section):
    """A reward in addition to the reward model: exactly one of `function`, `model` and `url`. Each receives prompts and
    completions as text; functions and endpoints can ask for further inputs, such as references."""

    function: Annotated[str | None, External("function")] = None
    """Reward function, as `file.py:function` or `package.module:function`; see `label.function`."""
    model: ModelName = None
    """Folder or hub id of a further reward model: one made by `train-rm` or any transformers classifier with one
    label."""
    url: Address = None
    """URL of an HTTP endpoint; docs/rewards.md describes request and response."""
    weight: float = 1.0
    """Factor applied to this reward before rewards are combined. A reward with weight 0 is logged and watched by
    `ppo.detectors.gold`, but not trained on."""
    send: list[Literal["references", "completion_ids", "raw_completions"]] = Field(default_factory=list)
    """What a request to `url` holds besides prompts and completions; docs/rewards.md describes each."""
    token_env: VariableName = None
    """Environment variable that holds the bearer token for `url`."""
    timeout: Annotated[Positive, EffortOnly()] = 30.0
    """Timeout of one attempt at `url`, in seconds, from name resolution to the last byte of the response."""
    retries: Annotated[int, Field(ge=0), EffortOnly()] = 5
    """Retries per request to `url` after a temporary failure."""
    request_size: Effort = 64
    """Completions per request to `url`."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name in ("function", "model", "url") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected exactly one of `function`, `model` and `url`; got {' and '.join(given) or 'none'}"
            )
        if self.url is None:
            for name in self.changed("send", "token_env", "timeout", "retries", "request_size"):
                raise ValueError(f"`{name}` has no effect without `url`")
        return self
