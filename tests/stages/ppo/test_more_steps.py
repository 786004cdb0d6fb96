"""A finished PPO run whose `steps` are raised ends with the bytes of one that had them from the start."""

from __future__ import annotations

import pytest

from tests.stages.ppo.test_save_steps import arguments, files

__all__ = ["files"]


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_added_steps_equal_those_of_a_longer_run(rlhf_here, files, adapter, tmp_path):
    kind = {"ppo__adapter": adapter}
    for run, steps, resumes in (("run", 2, False), ("run", 5, True), ("whole", 5, False)):
        code, said = rlhf_here(*arguments(run, ppo__steps=steps, **kind))
        assert code == 0, said
        assert ("ppo: resuming from step 2 of 5" in said) == resumes
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "run/ppo" / name).read_bytes() == (tmp_path / "whole/ppo" / name).read_bytes(), name
    assert len(list((tmp_path / "run/.ppo.last").glob("step-*"))) == 1
