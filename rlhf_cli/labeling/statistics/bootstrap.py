"""Estimates with intervals from sums per prompt: exact ones of shares, resampled ones of coefficients."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.intervals import PromptSums, jeffreys_interval, percentiles, resampled_sums, worth_of
from rlhf_cli.labeling.statistics.agreement import Coefficient, mirrored_alpha
from rlhf_cli.labeling.statistics.report import Estimate

RESAMPLES = 1_000
FEWEST_PROMPTS = 30
"""With fewer prompts the bootstrap interval of a coefficient is too narrow, so none is given."""
_STILL = 1e-9


class Bootstrap:
    """Named sums, resampled together.

    Args:
        prompts: number of prompts.
        seed: of the resamples.
    """

    def __init__(self, prompts: int, seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self._sums: dict[Hashable, PromptSums] = {}
        self._drawn: dict[Hashable, NDArray[np.float64]] = {}

    def add(self, key: Hashable, sums: PromptSums) -> None:
        """Add named sums before `resample`; columns: numerator and denominator, or the input of `mirrored_alpha`."""
        self._sums[key] = sums

    def resample(self) -> None:
        """Resample prompts, for everything that was added."""
        columns = {key: sums for key, sums in self._sums.items() if len(sums.prompts)}
        if columns:
            drawn = resampled_sums(list(columns.values()), self._prompts, resamples=RESAMPLES, seed=self._seed)
            self._drawn = dict(zip(columns, drawn, strict=True))

    def share(self, key: Hashable, missing: str) -> Estimate:
        """Ratio of the two columns of `key`, between 0 and 1."""
        return _share(self._sums[key], missing)

    def rest(self, whole: Hashable, part: Hashable, missing: str) -> Estimate:
        """Ratio of `whole` without `part`."""
        everything, own = self._sums[whole], self._sums[part]
        values = everything.values.copy()
        values[np.searchsorted(everything.prompts, own.prompts)] -= own.values
        return _share(PromptSums(everything.prompts, values), missing)

    def alpha(self, key: Hashable, found: Coefficient, count: int) -> Estimate:
        """A nominal alpha of `count` pairs of completions; its sums are the input of `mirrored_alpha`."""
        sums, drawn = self._sums[key], self._drawn.get(key)
        prompts = int(np.count_nonzero(sums.values[:, 1]))
        if found.value is None or drawn is None:
            return Estimate(count=count, prompts=prompts, missing=found.missing)
        if prompts < FEWEST_PROMPTS or found.value > 1 - _STILL:
            return Estimate(found.value, count=count, prompts=prompts)
        low, high = percentiles(mirrored_alpha(drawn))
        return Estimate(found.value, low, high, count, prompts)


def _share(sums: PromptSums, missing: str) -> Estimate:
    above, below = sums.values.T
    count = float(below.sum())
    if count < _STILL:
        return Estimate(missing=missing)
    value, prompts = min(1.0, max(0.0, float(above.sum()) / count)), int(np.count_nonzero(below > _STILL))
    worth = worth_of(sums)
    low, high = jeffreys_interval(value, worth)
    return Estimate(value, low, high, round(count), prompts, worth)
