"""What torch itself offers."""

from __future__ import annotations

from rlhf_cli.attention.backends import reference
from rlhf_cli.attention.contract import Backend

BACKEND = Backend(
    "torch", "the fastest correct path torch offers", reference.attend, lambda: None, lambda request: None
)
