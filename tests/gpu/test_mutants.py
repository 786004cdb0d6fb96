"""Faults that are put into the code on purpose are found by these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.inputs import options, write_inputs
from tests.gpu.mutants import KEEPS, REFUSED, WAITS
from tests.gpu.running import Host
from tests.gpu.test_memory import check_growth, peak_of_ppo
from tests.gpu.test_sync_budget import SYNCS_PER_TOKEN, check, decoded

REWARD = ("--prompts", "prompts.jsonl", "--function", "gold.py:score")
PPO = ("ppo", *REWARD, *options("ppo", {"ppo.steps": 1}))
COMMANDS = {
    "sft loss": ("sft", "--data", "demonstrations.jsonl", *options("sft")),
    "label scoring": ("train-rm", "--data", "rankings.jsonl", *options("train-rm")),
}
"""Place of the fault -> command that meets it; `PPO` for all others."""


@pytest.mark.parametrize("place", REFUSED)
def test_a_missing_transfer_is_refused(place: str, gpu: Host, tiny_llama: Path, tmp_path: Path):
    package = REFUSED[place].apply(tmp_path / "mutant")
    command = COMMANDS.get(place, PPO)
    folder = write_inputs(tmp_path / "run")
    outcome = gpu.command(folder, *command, "--model", tiny_llama, code=None, package=package)
    assert outcome.code != 0
    assert "on the same device" in outcome.stderr + outcome.raised


def test_a_synchronization_in_the_decode_loop_is_over_the_budget(gpu: Host, tiny_llama: Path, tmp_path: Path):
    package = WAITS.apply(tmp_path / "mutant")
    few, many = (decoded(gpu, tmp_path, tiny_llama, tokens=tokens, package=package) for tokens in (2, 6))
    with pytest.raises(AssertionError, match=r"logits\.sum\(\)\.item\(\)"):
        check("sync", few, many, units=4, each=SYNCS_PER_TOKEN, unit="tokens")


def test_a_tensor_that_is_kept_makes_memory_grow(gpu: Host, tiny_llama: Path, tmp_path: Path):
    package = KEEPS.apply(tmp_path / "mutant")
    few, many = (peak_of_ppo(gpu, tmp_path / str(steps), tiny_llama, steps, package=package) for steps in (1, 3))
    with pytest.raises(AssertionError, match="grows"):
        check_growth(few, many)
