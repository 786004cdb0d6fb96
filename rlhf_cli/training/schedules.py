"""Learning rates as functions of the optimizer step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def rate_factor(step: int, total: int, *, schedule: Schedule, warmup: int = 0) -> float:
    """Factor on the peak learning rate at optimizer step `step` (0-based) of `total`.

    It rises linearly over `warmup` steps, then stays, falls linearly to 0 at step `total`, or along half a cosine.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(total - warmup, 1)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
