"""The `evaluate` section of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_cli.settings.base import (
    Count,
    DataName,
    Effort,
    External,
    FunctionName,
    ModelName,
    NonNegative,
    Section,
    StageSection,
)
from rlhf_cli.settings.judges import JudgeSettings
from rlhf_cli.settings.shared import StageSamplingSettings


class PolicySettings(Section):
    """One more policy to evaluate."""

    model: Annotated[str, External("model")]
    """Folder or hub id of the model, such as the output of another run, or a PPO policy that was written earlier."""
    name: str | None = None
    """Its name in tables and results; null is `RUN/STAGE` for the output of a stage, `RUN/ppo/steps/20` for a policy
    of `ppo.save_steps`, else the folder's name or the hub id. `--also NAME=MODEL` sets both."""
    best_of: Count = 1
    """The n of best-of-n: each completion is the one with the highest reward of n samples; with 1, nothing is selected.
    The KL of best-of-n is not measured, but bounded."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """Read `NAME=MODEL`, as an option gives it."""
        model = given.get("model") if isinstance(given, dict) else None
        if isinstance(model, str) and given.get("name") is None and (found := re.fullmatch(r"([^=/\\]+)=(.+)", model)):
            return {"name": found[1], "model": found[2]}
        return given

    @field_validator("name")
    @classmethod
    def _short(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[\w.@+-][\w .@+/-]{0,39}", name):
            raise ValueError(f"expected up to 40 letters, digits, spaces or any of `_.@+-/`; got `{name}`")
        return name


class EvaluateSettings(StageSection):
    """Comparison of a policy with a baseline on held-out prompts: by default of PPO's policy with the model that it
    started from."""

    baseline: ModelName = None
    """Model to compare with; null is `ppo.model` if given, else the output of `sft`."""
    policy: ModelName = None
    """Model to evaluate; null is the output of `ppo`, or the first of `policies` if there is none."""
    policies: list[PolicySettings] = Field(default=[])
    """More models to evaluate, each compared with the baseline and with the others on the same prompts."""
    reward_model: ModelName = None
    """Reward model whose mean reward is reported; null is the output of `train-rm`, else `ppo.reward_model`, else
    none."""
    prompts: DataName = None
    """Prompt records, all of which are used; null is the held-out share (`data.holdout`) of `data.prompts`."""
    trained_prompts: Literal["refuse", "skip", "use"] = "refuse"
    """What happens if policy or baseline was trained on some of the prompts: `refuse` ends the stage with their number,
    `skip` evaluates on the others, `use` evaluates on all."""
    judge_function: FunctionName = None
    """Function that scores completions and decides which model wins, as `file.py:function` or
    `package.module:function`. Null decides by the reward model; PPO was trained against it, so such a win shows that
    training worked, not that quality improved."""
    demonstrations: DataName = None
    """Demonstration records on which the perplexity of every model is measured: what training for rewards costs
    elsewhere (the alignment tax). Those whose prompts a model was trained on are skipped. Null measures none."""
    tasks: list[str] = Field(default=[])
    """Tasks of lm-evaluation-harness to run on every model, such as `[arc_easy]`; `lm-eval ls tasks` lists them. Needs
    the package lm-eval, which has prompts, data and metrics of its own."""
    judge: JudgeSettings | None = None
    """Language models that compare the completions of each prompt and decide which model wins, in place of a
    `judge_function`."""
    labels: DataName = None
    """Rankings by people of the completions of this evaluation: its `items.jsonl`, labeled with `label.items`. They
    decide which model wins. Only labeled prompts are evaluated; where all models wrote the same completion, there is
    nothing to label. With several annotators, the majority counts."""
    tie_margin: NonNegative = 0.0
    """Scores that differ by at most this much are a tie; a tie counts 1/2."""
    max_prompts: Count | None = None
    """Maximum number of prompts; null uses all."""
    samples_per_prompt: Count = 1
    """Completions per prompt from each model."""
    sampling: StageSamplingSettings = StageSamplingSettings()
    """How completions of all models are sampled; null inherits (see the section `sampling`), from the policy."""
    shown_samples: Effort = 5
    """Number of prompts whose completions are shown side by side in the terminal; all are saved."""

    @property
    def decided_by(self) -> Literal["function", "judges", "people", "reward model"]:
        """What decides which completion wins."""
        if self.labels is not None:
            return "people"
        if self.judge is not None:
            return "judges"
        return "reward model" if self.judge_function is None else "function"

    def best_of(self, evaluated: int) -> list[int]:
        """Return the `best_of` of each evaluated policy; `policies` are the last of them."""
        given = [one.best_of for one in self.policies]
        return [1] * (evaluated - len(given)) + given

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [one.name for one in self.policies if one.name is not None]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two `policies` are named `{repeated}`")
        return self

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        given = [name for name in ("judge", "judge_function", "labels") if getattr(self, name) is not None]
        if len(given) > 1:
            names = " and ".join(f"`{name}`" for name in given)
            raise ValueError(f"{names} are mutually exclusive: one of them decides which model wins")
        if self.tie_margin and given and given != ["judge_function"]:
            raise ValueError(f"`tie_margin` has no effect with `{given[0]}`, which gives no scores")
        return self
