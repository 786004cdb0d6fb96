"""What an update adds up: sums over real tokens, the worst ratio, and the outcome of its optimizer steps."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

Sums = defaultdict[str, float]
"""Name -> sum, 0 for a name without one."""


@dataclass(frozen=True)
class WorstRatio:
    """The token whose probability changed the most.

    Attributes:
        log_ratio: |log pi_new / pi_old|, nats.
        completion: number of its completion in the step.
        token: number of the token in that completion.
    """

    log_ratio: float = 0.0
    completion: int = 0
    token: int = 0


@dataclass
class UpdateStatistics:
    """Sums over the real tokens of an update, and the outcome of its optimizer steps.

    Attributes:
        sums: name -> sum over tokens (and epochs); `tokens`, `policy_tokens` and `ptx_tokens` count them.
        epochs: per epoch, mean approx_kl, clip fraction and ratio, in that order.
        policy_norms, critic_norms: gradient norms before clipping, per optimizer step that trained the model.
        worst: the largest ratio.
        skipped_steps: optimizer steps skipped because a gradient was not finite.
        ratio_skips: optimizer steps skipped because the mean ratio exceeded its limit.
        stopped: whether the update ended early because of its KL.
    """

    sums: Sums = field(default_factory=lambda: defaultdict(float))
    epochs: list[tuple[float, float, float]] = field(default_factory=list)
    policy_norms: list[float] = field(default_factory=list)
    critic_norms: list[float] = field(default_factory=list)
    worst: WorstRatio = WorstRatio()
    skipped_steps: int = 0
    ratio_skips: int = 0
    stopped: bool = False

    def mean(self, name: str, per: str = "tokens") -> float:
        """Return the mean per token of those that `per` counts; NaN without any."""
        return self.sums[name] / self.sums[per] if self.sums[per] else math.nan

    def close_epoch(self, before: Sums) -> None:
        """Add the means of an epoch, given the sums before it."""
        tokens = self.sums["policy_tokens"] - before["policy_tokens"]
        names = ("approx_kl", "clipped", "ratio")
        kl, clipped, ratio = ((self.sums[name] - before[name]) / tokens if tokens else math.nan for name in names)
        self.epochs.append((kl, clipped, ratio))


class DeviceSums:
    """Sums and the worst ratio of a minibatch, on the device until they are read, for which a GPU waits once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: Sums = defaultdict(float)
        self._worst: list[Tensor] = []

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar, in float64."""
        value = value.detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def count(self, name: str, value: int) -> None:
        """Add a number that the host knows."""
        self._counts[name] += value

    def see(self, log_ratios: Tensor, completions: Tensor, tokens: Tensor) -> None:
        """Keep the worst token of a micro-batch, given the largest |log ratio| of each completion and where it is."""
        largest, row = log_ratios.max(dim=0)
        self._worst.append(torch.stack([one.double() for one in (largest, completions[row], tokens[row])]))

    def sums(self) -> dict[str, float]:
        """Read the sums."""
        values = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        return dict(zip(self._sums, values, strict=True)) | self._counts

    def worst(self) -> WorstRatio:
        """Read the token whose probability changed the most."""
        found = torch.stack(self._worst).tolist() if self._worst else []
        seen = [WorstRatio(ratio, int(completion), int(token)) for ratio, completion, token in found]
        return max([WorstRatio(), *seen], key=lambda one: one.log_ratio)
