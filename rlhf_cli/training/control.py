"""What the training loops have in common about stopping and giving up."""

from __future__ import annotations

from typing import Protocol

BAD_STEPS_IN_A_ROW = 3
"""So many steps without a finite gradient, one after another, mean that training has diverged."""


class Stop(Protocol):
    """Asks whether a signal wants the work to stop."""

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        ...

    def check(self) -> None:
        """Raise `Interrupted` if so."""
