"""From sums by prompt to figures with intervals; one set of resamples serves all of them."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.intervals import PromptSums, percentiles, ratios, resampled_sums, wilson_interval, worth_of
from rlhf_cli.labeling.statistics.agreement import Coefficient, mirrored_alpha
from rlhf_cli.labeling.statistics.report import Figure

RESAMPLES = 1_000
FEWEST_PROMPTS = 30
"""With fewer, the bootstrap's intervals are too narrow, and Wilson's is taken, see `worth_of`."""
_STILL = 1e-9


class Figures:
    """Sums of many figures, resampled together.

    Args:
        prompts: how many there are.
        seed: of the draws.
    """

    def __init__(self, prompts: int, seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self._sums: dict[Hashable, PromptSums] = {}
        self._drawn: dict[Hashable, NDArray[np.float64]] = {}

    def add(self, key: Hashable, sums: PromptSums) -> None:
        """Name sums, before `resample`; columns are numerator and denominator, or what `mirrored_alpha` takes."""
        self._sums[key] = sums

    def resample(self) -> None:
        """Draw prompts, for everything that was added."""
        columns = {key: sums for key, sums in self._sums.items() if len(sums.prompts)}
        if columns:
            drawn = resampled_sums(list(columns.values()), self._prompts, resamples=RESAMPLES, seed=self._seed)
            self._drawn = dict(zip(columns, drawn, strict=True))

    def share(self, key: Hashable, missing: str) -> Figure:
        """Ratio of the two columns of `key`, which lies between 0 and 1."""
        return _share(self._sums[key], self._drawn.get(key), missing)

    def rest(self, whole: Hashable, part: Hashable, missing: str) -> Figure:
        """Ratio of `whole` without `part`."""
        everything, own = self._sums[whole], self._sums[part]
        values = everything.values.copy()
        values[np.searchsorted(everything.prompts, own.prompts)] -= own.values
        drawn = self._drawn.get(whole)
        if drawn is not None and part in self._drawn:
            drawn = drawn - self._drawn[part]
        return _share(PromptSums(everything.prompts, values), drawn, missing)

    def alpha(self, key: Hashable, found: Coefficient, count: int) -> Figure:
        """A nominal alpha of `count` pairs of answers with its interval; its sums are those of `mirrored_alpha`."""
        sums, drawn = self._sums[key], self._drawn.get(key)
        prompts = int(np.count_nonzero(sums.values[:, 1]))
        if found.value is None or drawn is None:
            return Figure(count=count, prompts=prompts, missing=found.missing)
        if prompts < FEWEST_PROMPTS or found.value > 1 - _STILL:
            return Figure(found.value, count=count, prompts=prompts)
        low, high = percentiles(mirrored_alpha(drawn))
        return Figure(found.value, low, high, count, prompts)


def _share(sums: PromptSums, drawn: NDArray[np.float64] | None, missing: str) -> Figure:
    above, below = sums.values.T
    count = float(below.sum())
    if drawn is None or count < _STILL:
        return Figure(missing=missing)
    value, prompts = min(1.0, max(0.0, float(above.sum()) / count)), int(np.count_nonzero(below > _STILL))
    worth = worth_of(sums)
    low, high = wilson_interval(value, worth)
    if prompts >= FEWEST_PROMPTS:
        spread = ratios(drawn)
        if np.nanstd(spread) > _STILL:  # not where all prompts have the same share, such as 1
            low, high = percentiles(spread)
    return Figure(value, low, high, round(count), prompts, worth)
