"""The section of `rlhf overopt`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf_cli.settings.base import Count, Section


class OveroptSettings(Section):
    """Over-optimization of proxy reward models (Gao et al. 2022, arXiv:2210.10760), for `rlhf overopt`. The function or
    reward model of section `label` is the gold reward; proxies are trained by section `train_rm` and optimized by
    section `ppo`."""

    labels: Count = 64
    """Number of labels of the smallest proxy; a label is a pair of completions, of which the gold reward prefers
    one."""
    multiples: Annotated[list[Count], Field(min_length=1)] = Field(default=[1, 4, 16])
    """Sizes of the proxies' data, as multiples of `labels`. The labels of a smaller proxy are among those of a larger
    one."""
    noise: Annotated[list[Annotated[float, Field(ge=0.0, lt=0.5)]], Field(min_length=1)] = Field(default=[0.0])
    """Shares of labels that are swapped as noise; each share is tried with every size."""
    seeds: Count = 3
    """Runs per proxy, each with its own seed for labels, reward model and PPO. They start from the same policy."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 64
    """Completions per held-out prompt for best of n; also the largest n."""
    eval_steps: Count = 4
    """PPO steps between measurements; the first measurement is before training."""
    eval_prompts: Count = 64
    """Maximum number of held-out prompts to measure on; for PPO, also at most half of all held-out prompts."""
