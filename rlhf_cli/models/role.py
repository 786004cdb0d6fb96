"""What a run uses a model for. Imports no torch."""

from __future__ import annotations

from typing import Literal

ModelRole = Literal["policy", "judge", "reward model", "start of a reward model"]
"""A policy writes text, a judge compares two, a reward model has a head with one label."""
