"""What the training loops have in common about stopping and giving up."""

from __future__ import annotations

BAD_STEPS_IN_A_ROW = 3
"""So many steps without a finite gradient, one after another, mean that training has diverged."""
