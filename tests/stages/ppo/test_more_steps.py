"""A PPO run whose `steps` change on the way ends with the bytes of one that had them from the start."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli.errors import Interrupted
from rlhf_cli.stages.ppo.trainer import PPOTrainer
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


@pytest.fixture
def begin(rlhf_here, monkeypatch):
    """Begin a run of 40 steps, which is interrupted after some."""

    def run(done: int, **changes: object) -> None:
        step = PPOTrainer.step

        def interrupted(self, number, watch=None):
            if number == done:
                raise Interrupted(signal.SIGTERM)
            return step(self, number, watch)

        with monkeypatch.context() as patched:
            patched.setattr(PPOTrainer, "step", interrupted)
            code, said = rlhf_here(*arguments("run", ppo__steps=40, **changes))
        assert code == 143, said

    return run


CONTROLLED = {"ppo__kl_target": 1.0, "ppo__kl_horizon": 10, "ppo__reward_scale": "running"}


@pytest.mark.parametrize("changes", [{}, CONTROLLED, {"ppo__critic_warmup_steps": 1}], ids=["", "KL control", "critic"])
def test_a_shortened_run_equals_one_that_was_short_from_the_start(rlhf_here, files, begin, changes, tmp_path):
    begin(2, **changes)
    for run in ("run", "whole"):
        code, said = rlhf_here(*arguments(run, ppo__steps=4, **changes))
        assert code == 0, said
        assert ("ppo: resuming from step 2 of 4" in said) == (run == "run")
    manifests = [json.loads((tmp_path / run / "ppo/manifest.json").read_text()) for run in ("run", "whole")]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "run/ppo" / name).read_bytes() == (tmp_path / "whole/ppo" / name).read_bytes(), name


def test_a_run_that_ends_with_the_steps_done_is_evaluated_as_one_that_ends_there(rlhf_here, files, begin, tmp_path):
    changes = {"ppo__eval_steps": 2, "ppo__kl_budget": 50.0, "data__holdout": 0.3, "ppo__show_steps": 2}
    begin(3, **changes)
    for run in ("run", "whole"):
        code, said = rlhf_here(*arguments(run, ppo__steps=3, **changes))
        assert code == 0, said
    found = [load_file(tmp_path / run / "ppo/model.safetensors") for run in ("run", "whole")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])
    rows = [
        [json.loads(line) for line in (tmp_path / run / "ppo/metrics.jsonl").read_text().splitlines()]
        for run in ("run", "whole")
    ]
    assert rows[0][:-1] == rows[1][:-1]
    evaluated = [{name: row[-1][name] for name in row[-1] if name.startswith("eval/")} for row in rows]
    assert evaluated[0] == evaluated[1] != {}
    assert rows[1][-1].keys() - rows[0][-1].keys() <= {"detectors/held_out"}, "detectors saw the step without it"
    samples = [(tmp_path / run / "ppo/samples.jsonl").read_bytes() for run in ("run", "whole")]
    assert samples[0] == samples[1]


def test_a_run_that_ends_where_an_evaluation_was_due_is_not_evaluated_again(rlhf_here, files, begin, tmp_path):
    changes = {"ppo__eval_steps": 2, "data__holdout": 0.3, "ppo__save_steps": 1}
    begin(2, **changes)
    for run in ("run", "whole"):
        assert rlhf_here(*arguments(run, ppo__steps=2, **changes))[0] == 0
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "run/ppo" / name).read_bytes() == (tmp_path / "whole/ppo" / name).read_bytes(), name
    saved = [{path.name for path in (tmp_path / run / "ppo/steps").iterdir()} for run in ("run", "whole")]
    assert saved == [{"1", "2"}, {"1"}], "the policy of a step that was not the last stays"
