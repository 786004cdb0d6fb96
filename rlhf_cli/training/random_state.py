"""Where random numbers come from, and the global random generators of a process, for checkpoints.

With s the seed of the recipe, H(text) the first 8 bytes of SHA-256 of the text, big-endian (0 to 2^64 - 1), and
key = `prompt_key` or `split_key` of a prompt:

  held-out prompts      those with H("holdout <split seed> <split key>") / 2^64 < holdout      data/splits.py
  order of an epoch     randperm, seeded with H("shuffle <name> <s> <epoch>") >> 1              training/shuffle.py
  tokens of sample k    uniforms, seeded with H("sample <s> <k> <prompt key>") >> 1             data/records.py
  new weights           seeded with s; member m of an ensemble with s + 1,000,003 (m - 1)       models/seeding.py
  dropout, user code    global generators, seeded with s + 100,003 rank                         here

Sums are modulo 2^32, and `>> 1` gives the 63 bits that torch takes. For member m of an ensemble of reward models, s is
the member's seed in the order of the data too. Prefixes such as "shuffle" make the streams independent.

All rows but the last are functions of their arguments alone: not of the batch, the number of processes, what was drawn
before, or where the run was resumed. In PPO, k counts the completions of the whole run. In an evaluation, baseline and
policies have the same k and so the same uniforms, which makes their comparison paired.

Dropout, and code of the user's such as a reward function, draw from the global generators of Python, NumPy and torch; a
resumed run must continue those where the checkpoint left them.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.progress import say

SEED_STRIDE = 100_003
"""Distance between the seeds of two processes, as in lm-human-preferences."""


def seed_everything(seed: int, process: int) -> None:
    """Seed the global generators of one process with (seed + 100,003 process) modulo 2^32."""
    own = (seed + SEED_STRIDE * process) % 2**32
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


def random_states(processes: ProcessGroup) -> list[dict[str, Any]]:
    """Return the random state of every process, by rank; all processes call this."""
    return processes.all_gather_object(random_state())


def restore_random_states(states: list[dict[str, Any]], processes: ProcessGroup, seed: int) -> None:
    """Restore this process's generators; what the checkpoint does not have is seeded from `seed` and rank, and said.

    Args:
        states: result of `random_states`, of perhaps fewer processes than run now.
        processes: the processes that run now.
        seed: seed of the run.
    """
    seed_everything(seed, processes.index)
    if processes.index < len(states):
        restore_random_state(states[processes.index])
    if difference := _difference(states, processes):
        say(f"random generators: {difference}; only dropout and functions of yours that draw numbers depend on this")


def _difference(states: list[dict[str, Any]], processes: ProcessGroup) -> str:
    """Say how this run's generators differ from those of a checkpoint; empty if they do not."""
    found = []
    if (new := processes.count - len(states)) > 0:
        found.append(f"{new} of {processes.count} processes are new, and seeded")
    elif new < 0:
        found.append(f"those of {-new} of {len(states)} processes are dropped")
    had_gpu, has_gpu = "cuda" in states[0], torch.cuda.is_initialized()
    if has_gpu and not had_gpu:
        found.append("the checkpoint was written without a GPU: the GPU's generator is seeded")
    if had_gpu and not has_gpu:
        found.append("that of the checkpoint's GPU is dropped")
    return "; ".join(found)


def random_state() -> dict[str, Any]:
    """Return the state of this process's global generators, as JSON can express it."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # pyright: ignore[reportGeneralTypeIssues]
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_initialized():  # asking a GPU that the run does not use would occupy it
        state["cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore the generators that `random_state` found and that exist here.

    A run that goes on with a GPU where there was none keeps the seed that it gave to the GPU's generator.
    """
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
