"""What becomes of a reward before it is trained on: scale, clip, and rules for long or unfinished completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all rewards so far.

    Attributes:
        count: rewards.
        mean: of them.
        squares: sum of (reward - mean)^2.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def including(self, rewards: Sequence[float]) -> RunningMoments:
        """With further rewards, by the pairwise update of Chan, Golub and LeVeque (1979)."""
        if not rewards:
            return self
        new = torch.tensor(rewards, dtype=torch.float64)
        mean, squares = float(new.mean()), float(((new - new.mean()) ** 2).sum())
        count = self.count + len(rewards)
        shift = mean - self.mean
        return RunningMoments(
            count,
            self.mean + shift * len(rewards) / count,
            self.squares + squares + shift**2 * self.count * len(rewards) / count,
        )

    @property
    def std(self) -> float:
        """Population standard deviation; 1 where there is no spread yet, so that dividing by it changes nothing."""
        spread = (self.squares / self.count) ** 0.5 if self.count else 0.0
        return spread if spread > 0.0 else 1.0


@dataclass(frozen=True)
class RewardShape:
    """How a score becomes the reward that is trained on, in the order of the fields.

    Attributes:
        clip: scaled scores are cut to +- this; None does not cut.
        missing_eos_reward: replaces the score of a completion that did not end, the "EOS trick" of
            summarize-from-feedback; None leaves it.
        missing_eos_penalty: subtracted from the score of such a completion.
        length_penalty: subtracted for each token.
    """

    clip: float | None = None
    missing_eos_reward: float | None = None
    missing_eos_penalty: float = 0.0
    length_penalty: float = 0.0

    def apply(self, scores: Tensor, ended: Tensor, lengths: Tensor, *, scale: float = 1.0) -> Tensor:
        """Rewards to train on: (N,).

        Args:
            scores: (N,) as they were given.
            ended: (N,) bool, whether the completion is finished.
            lengths: (N,) tokens, the end token included.
            scale: factor on the scores.
        """
        rewards = scores * scale
        if self.clip is not None:
            rewards = rewards.clamp(-self.clip, self.clip)
        if self.missing_eos_reward is not None:
            rewards = torch.where(ended, rewards, self.missing_eos_reward)
        rewards = torch.where(ended, rewards, rewards - self.missing_eos_penalty)
        return rewards - self.length_penalty * lengths
