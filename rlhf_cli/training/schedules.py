"""Learning rates as functions of the optimizer step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def rate_factor(step: int, total: int, *, schedule: Schedule, warmup: int = 0) -> float:
    """Return the factor on the peak learning rate at the 0-based optimizer step `step` of `total`.

    The factor rises linearly over `warmup` steps, from 1 / `warmup` to 1. Then it stays at 1, falls linearly to 0 at
    step `total`, or follows half a cosine down to 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(total - warmup, 1)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
