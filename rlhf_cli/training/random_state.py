"""The global random states of a process, for checkpoints.

PPO itself draws from generators that are functions of seed and step. Code of the user's, such as a reward function, may
draw from Python's, NumPy's or torch's global generators, and a resumed run is to give it the same numbers.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

SEED_STRIDE = 100_003
"""Between the seeds of two processes, as in lm-human-preferences."""


def seed_everything(seed: int, process: int) -> None:
    """Seed the global generators of one process."""
    own = (seed + SEED_STRIDE * process) % 2**32
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


def random_state() -> dict[str, Any]:
    """The state of all global generators as JSON can say it."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # pyright: ignore[reportGeneralTypeIssues]
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Inverse of `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
