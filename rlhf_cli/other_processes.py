"""How much other processes use the processors of this machine while something is measured."""

from __future__ import annotations

import os
import time

import psutil  # a dependency of accelerate

_SHARE = 0.2
"""Share of all cores that others must use to be mentioned: less hardly changes a prediction."""
_IDLE = 0.1
"""Share of all cores that may be idle then: with more, others take nothing from this process."""


class ProcessorUse:
    """Counts from when it is made; this process and children that it has waited for are not others."""

    def __init__(self) -> None:
        self._began, (self._all, self._own) = time.monotonic(), _used()

    def others(self) -> str | None:
        """Return a line if others take processor time from this process, with what that means for a prediction."""
        elapsed, cores = time.monotonic() - self._began, psutil.cpu_count() or 1
        whole, own = _used()
        if elapsed <= 0:
            return None
        mine = (own - self._own) / elapsed
        others = max((whole - self._all) / elapsed - mine, 0.0)
        if others < _SHARE * cores or cores - others - mine > _IDLE * cores:
            return None
        return (
            f"other processes used {min(others, cores):.1f} of {cores} processor cores during the measurement: the "
            "time holds while they do, and is shorter without them"
        )


def _used() -> tuple[float, float]:
    """Return seconds of processor time that all processes took since the machine started, and those of this one."""
    times, own = psutil.cpu_times()._asdict(), os.times()
    busy = sum(times.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    return busy, own.user + own.system + own.children_user + own.children_system
