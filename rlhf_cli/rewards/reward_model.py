"""Reward models as rewards: ours, or any transformers classifier with one label, each with its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Protocol

from rlhf_cli.data.records import Prompt
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.model import load_reward_model


class ScoresText(Protocol):
    """What `RewardModel` and `RewardModelHandle` have in common."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Normalized rewards, one an answer."""
        ...


@dataclass(frozen=True)
class ModelReward:
    """A reward model as a reward.

    Its scores are normalized as its artifact says; a classifier that is not ours gives its logit as it is. The end
    token is put behind every answer, as in training (trap 10 of docs/ppo.md).

    Attributes:
        name: short, for messages and metrics.
        model: scores text.
    """

    name: str
    model: ScoresText

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """See `Reward`."""
        return self.model.score(prompts, completions)


def load_model_reward(source: ModelSource, *, template: str | None) -> ModelReward:
    """Load a reward model, frozen.

    Args:
        source: folder or hub id, and how to hold it.
        template: of prompts that are plain text, for a model that does not say; our artifacts say.

    Raises:
        ModelError: no reward model: several labels, no head, damaged files.
    """
    return ModelReward(PurePath(source.path).name or source.path, load_reward_model(source, template=template))
