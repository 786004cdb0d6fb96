"""The `best_of_n` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from rlhf_cli.settings.base import Count, DataName, FileName, FunctionName, ModelName, StageSection
from rlhf_cli.settings.shared import StageSamplingSettings

_OF_SAMPLING = ("policy", "prompts", "max_prompts", "samples_per_prompt", "sampling")


class BestOfNSettings(StageSection):
    """The best of n completions by a reward, for growing n: the baseline that PPO has to beat."""

    policy: ModelName = None
    """Model to sample from; null is the output of `sft`."""
    reward_model: ModelName = None
    """Reward model that chooses the best completion; null is the output of `train-rm`, unless `function` chooses."""
    function: FunctionName = None
    """Function that chooses the best completion, in place of a reward model; see `label.function`."""
    gold_model: ModelName = None
    """Reward model that measures the chosen completions."""
    gold_function: FunctionName = None
    """Function that measures the chosen completions, in place of `gold_model`. Without either, they are measured only
    by the reward that chose them, which always rises with n."""
    prompts: DataName = None
    """Prompt records, all of which are used; null is the held-out share (`data.holdout`) of `data.prompts`."""
    max_prompts: Count | None = None
    """Maximum number of prompts; null uses all."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 64
    """N, the number of completions per prompt. The best of n is estimated for n = 1, 2, 4, ... up to N; close to N the
    estimate is noisy."""
    samples: FileName = None
    """`samples.jsonl` of an earlier `best-of-n`, whose completions are scored in place of new ones."""
    write_best: Count | None = None
    """Also write `best.jsonl`: for each prompt, the best of its first `write_best` completions, as demonstrations for
    `sft.data`. Null writes none."""
    sampling: StageSamplingSettings = StageSamplingSettings()
    """How completions are sampled; null inherits (see the section `sampling`)."""

    @property
    def loads_model(self) -> bool:
        """Whether the `model` settings affect the result."""
        return self.samples is None or self.function is None or self.gold_model is not None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for one, other in (("reward_model", "function"), ("gold_model", "gold_function")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"`{one}` and `{other}` are mutually exclusive")
        for name in self.changed(*_OF_SAMPLING) if self.samples is not None else ():
            raise ValueError(f"`{name}` has no effect together with `samples`, which provides the completions")
        if self.samples is None and (self.write_best or 1) > self.samples_per_prompt:
            raise ValueError(f"`write_best: {self.write_best}` exceeds `samples_per_prompt: {self.samples_per_prompt}`")
        return self
