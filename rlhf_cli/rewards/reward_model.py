"""Reward models as rewards: our own, or any transformers classifier with one label, with its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Protocol

from rlhf_cli.data.records import Prompt
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.loading import load_reward_model
from rlhf_cli.models.reward_model.sharded import load_divided
from rlhf_cli.rewards.base import NO_COLUMNS, Columns


class ScoresText(Protocol):
    """The common interface of `RewardModel` and `RewardModelHandle`."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Return normalized rewards, one per completion."""
        ...


@dataclass(frozen=True)
class ModelReward:
    """A reward model as a reward.

    Scores of our reward models are normalized as `reward.json` says; other classifiers return their logit. Every
    completion is scored as one that ended, as in training (trap 10 of docs/ppo.md).

    Attributes:
        name: short name for messages and metrics.
        model: the reward model.
    """

    name: str
    model: ScoresText

    @property
    def is_sharded(self) -> bool:
        """Whether all processes score together."""
        return getattr(self.model, "is_sharded", False)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Columns = NO_COLUMNS
    ) -> list[float]:
        """See `Reward`."""
        return self.model.score(prompts, completions)


def load_model_reward(source: ModelSource, *, template: str | None, is_sharded: bool = False) -> ModelReward:
    """Load a frozen reward model as a reward.

    Args:
        source: folder or hub id of the reward model.
        template: template of plain-text prompts, for a model that does not record its own.
        is_sharded: divide its weights among the processes, all of which then call this.

    Raises:
        ModelError: several labels, no head, or damaged files.
    """
    load = load_divided if is_sharded else load_reward_model
    return ModelReward(PurePath(source.path).name or source.path, load(source, template=template))
