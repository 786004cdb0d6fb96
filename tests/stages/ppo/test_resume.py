"""PPO stopped, damaged and gone astray: what is resumed ends as if nothing had happened."""

import pytest
import torch

from rlhf_cli.errors import DivergedError, Interrupted
from rlhf_cli.rewards.base import Scores
from rlhf_cli.training import loop
from rlhf_cli.training.checkpoint.store import best_checkpoint, latest_checkpoint

HELD_OUT = ("Who knows", "When is it", "A loaf", "The river")


def same_weights(one, other):
    mine, theirs = one.models.state(), other.models.state()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"kl_target": 1.0}, id="adaptive KL"),
        pytest.param({"reward_scale": "running", "minibatches": 2, "schedule": "cosine"}, id="running scale"),
        pytest.param({"eval_steps": 1, "kl_budget": 50.0, "show_steps": 1}, id="evaluation and budget"),
    ],
)
@pytest.mark.parametrize("kind", ["shared", "separate", "bfloat16"])
def test_interrupted_and_resumed_ends_with_the_same_bytes(
    kind, changes, tiny_llama, tmp_path, make_trainer, stop_after
):
    whole = make_trainer(tiny_llama, tmp_path / "whole", kind=kind, **changes)
    whole.train()
    cut = {"kind": kind, "checkpoint_steps": 50, **changes}
    with pytest.raises(Interrupted):
        make_trainer(tiny_llama, tmp_path / "cut", stop=stop_after(2), **cut).train()
    second = make_trainer(tiny_llama, tmp_path / "cut", kind=kind, **changes)
    second.train()
    assert second.state == whole.state
    assert second.loop.state == whole.loop.state
    assert same_weights(whole, second)
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (tmp_path / "whole" / name).exists():
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_reward_that_draws_from_global_generators_draws_the_same_after_a_resume(
    tiny_llama, tmp_path, make_trainer, stop_after
):
    import random

    import numpy as np

    def drawn(prompts, texts, columns):
        return Scores([random.random() + np.random.rand() + float(torch.rand(())) for _ in texts], {})

    make_trainer(tiny_llama, tmp_path / "whole", reward=drawn).train()
    with pytest.raises(Interrupted):
        make_trainer(tiny_llama, tmp_path / "cut", reward=drawn, stop=stop_after(2)).train()
    make_trainer(tiny_llama, tmp_path / "cut", reward=drawn).train()
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tiny_llama, tmp_path, capsys, make_trainer, stop_after):
    whole = make_trainer(tiny_llama, tmp_path / "whole")
    whole.train()
    with pytest.raises(Interrupted):
        make_trainer(tiny_llama, tmp_path / "cut", stop=stop_after(2)).train()
    newest = tmp_path / "cut/step-00000002/tensors.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-5] ^= 4
    newest.write_bytes(damaged)
    again = make_trainer(tiny_llama, tmp_path / "cut")
    again.train()
    assert "tensors.safetensors does not match its checksum" in " ".join(capsys.readouterr().err.split())
    assert same_weights(whole, again)


def test_resuming_a_finished_run_changes_nothing_and_says_how_it_ended(tiny_llama, tmp_path, make_trainer):
    first = make_trainer(tiny_llama, tmp_path / "w")
    first.train()
    before = (tmp_path / "w/metrics.jsonl").read_bytes()
    again = make_trainer(tiny_llama, tmp_path / "w")
    again.train()
    assert same_weights(first, again)
    assert (tmp_path / "w/metrics.jsonl").read_bytes() == before


def test_the_last_checkpoints_are_kept_and_no_others(tiny_llama, tmp_path, make_trainer):
    make_trainer(tiny_llama, tmp_path / "w", steps=5, keep_checkpoints=3).train()
    assert sorted(path.name for path in (tmp_path / "w").glob("step-*")) == [f"step-{step:08d}" for step in (3, 4, 5)]


def test_the_best_policy_within_the_budget_is_what_is_left(tiny_llama, tmp_path, make_trainer, rows_of):
    trainer = make_trainer(
        tiny_llama, tmp_path / "w", kind="separate", steps=8, eval_steps=2, kl_budget=1.0, kl_coef=0.0, epochs=4
    )
    trainer.train()
    evaluated = [row for row in rows_of(tmp_path / "w") if "eval/objective/kl" in row]
    assert [row["step"] for row in evaluated] == [0, 2, 4, 6, 8]
    assert evaluated[-1]["eval/objective/kl"] > 1.0, "the run must leave the budget, else this shows nothing"
    within = [row for row in evaluated if row["eval/objective/kl"] <= 1.0]
    expected = max(within, key=lambda row: row["eval/objective/reward"])
    assert trainer.state.best.step == expected["step"]
    kept = best_checkpoint(tmp_path / "w")
    assert all(torch.equal(kept.tensors[name], tensor) for name, tensor in trainer.models.state().items())
    newest = latest_checkpoint(tmp_path / "w")
    assert any(not torch.equal(newest.tensors[name], tensor) for name, tensor in trainer.models.state().items())


def test_nan_gradients_are_skipped_then_rolled_back_then_given_up(tiny_llama, tmp_path, monkeypatch, make_trainer):
    trainer = make_trainer(tiny_llama, tmp_path / "w", steps=9, epochs=1)
    calls = {"count": 0}
    plain = torch.nn.utils.clip_grad_norm_

    def poisoned(parameters, limit):
        calls["count"] += 1
        return torch.tensor(float("nan")) if calls["count"] > 4 else plain(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    with pytest.raises(DivergedError, match="ppo: training diverged at step"):
        trainer.train()
    # Two good steps, three bad ones, back to the newest checkpoint, three bad ones again; of policy and critic.
    assert calls["count"] == 16
    assert all(torch.isfinite(tensor).all() for tensor in trainer.models.state().values())


def test_a_broken_reward_skips_its_step_and_three_in_a_row_end_the_run(tiny_llama, tmp_path, make_trainer, rows_of):
    calls = {"count": 0}

    def broken(prompts, texts, columns):
        calls["count"] += 1
        bad = calls["count"] in (2, 5, 6, 7) or calls["count"] > 9
        return Scores(
            [float("nan") if bad and place == 3 else 1.0 * place for place in range(len(texts))], {}, ["gone wrong"]
        )

    trainer = make_trainer(tiny_llama, tmp_path / "w", steps=20, reward=broken)
    with pytest.raises(DivergedError, match="skipped in steps 7 to 9: gone wrong"):
        trainer.train()
    rows = rows_of(tmp_path / "w")
    assert rows[1]["skipped_steps"] == 2
    assert rows[1]["objective/scores"] is None
    assert rows[0]["skipped_steps"] == rows[2]["skipped_steps"] == 0
    # Calls 5 to 7 roll back to step 4 once, with half the learning rate; the next three end it.
    assert trainer.loop.state.rolled_back
    assert trainer.updater.rate_scale == 0.5


def test_a_policy_that_is_not_finite_goes_back_once_then_gives_up(tiny_llama, tmp_path, make_trainer):
    trainer = make_trainer(tiny_llama, tmp_path / "w", steps=6)
    plain, poisoned = trainer.updater.update, {"count": 0}

    def update(*arguments, **named):
        found = plain(*arguments, **named)
        poisoned["count"] += 1
        if poisoned["count"] >= 3:
            with torch.no_grad():
                trainer.models.policy_parameters()[0].fill_(float("nan"))
        return found

    trainer.updater.update = update
    with pytest.raises(DivergedError, match="ppo: training diverged at step"):
        trainer.train()
    for path in (tmp_path / "w").glob("step-*"):
        assert int(path.name[-8:]) <= 2
    kept = latest_checkpoint(tmp_path / "w")
    assert all(torch.isfinite(tensor).all() for tensor in kept.tensors.values() if tensor.is_floating_point())


def test_a_kill_in_the_first_step_and_a_start_from_nothing_leave_every_line_once(
    tiny_llama, tmp_path, make_trainer, monkeypatch
):
    """What is written before the first step is written once, whatever comes after it."""
    changes = {"eval_steps": 1, "show_steps": 1, "checkpoint_steps": 50}
    make_trainer(tiny_llama, tmp_path / "whole", **changes).train()

    class Killed(BaseException):
        """Nothing handles it, as nothing handles SIGKILL."""

    def killed(*arguments, **named):
        raise Killed

    for place in ("update", "save"):
        folder = tmp_path / place
        for _ in range(2):
            cut = make_trainer(tiny_llama, folder, **changes)
            with monkeypatch.context() as patched:
                patched.setattr(*((cut.updater, "update") if place == "update" else (loop, "save_checkpoint")), killed)
                with pytest.raises(Killed):
                    cut.train()
        make_trainer(tiny_llama, folder, **changes).train()
        for name in ("metrics.jsonl", "samples.jsonl"):
            assert (tmp_path / "whole" / name).read_bytes() == (folder / name).read_bytes(), (place, name)


@pytest.mark.parametrize("stopped_after", [None, 5, 6])
def test_where_a_run_was_stopped_does_not_change_where_it_goes_back_to(
    stopped_after, tiny_llama, tmp_path, make_trainer, stop_after, monkeypatch
):
    """Steps 5 to 7 are bad: back to step 4, the last regular checkpoint, also where a signal saved in between."""

    def reward(prompts, texts, columns):
        step = len((folder / "metrics.jsonl").read_text().splitlines()) + 1
        bad = 5 <= step <= 7 and not (folder / "gone back").exists()
        if bad and step == 7:
            (folder / "gone back").touch()
        return Scores([float("nan") if bad else float(len(text)) for text in texts], {}, ["bad"] if bad else [])

    ends = []
    for name, stop in (("whole", None), ("cut", stopped_after)):
        folder = tmp_path / name
        folder.mkdir()
        changes = {"steps": 8, "checkpoint_steps": 4, "keep_checkpoints": 1, "reward": reward}
        if stop is not None:
            with pytest.raises(Interrupted):
                make_trainer(tiny_llama, folder, stop=stop_after(stop), **changes).train()
        trainer = make_trainer(tiny_llama, folder, **changes)
        trainer.train()
        assert trainer.loop.state.rolled_back
        ends.append((trainer, (folder / "metrics.jsonl").read_bytes()))
    assert same_weights(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_a_new_run_misses_nothing(tiny_llama, tmp_path, make_trainer, capsys):
    make_trainer(tiny_llama, tmp_path / "w", steps=1).train()
    assert "is missing" not in capsys.readouterr().err


def test_a_roll_back_does_not_forget_the_best_policy(tiny_llama, tmp_path, make_trainer, rows_of):
    """Its file is the only one there is: what is said of it must be of the policy it holds."""

    class Done(BaseException):
        """Ends the run after its roll-back."""

    evaluations, asked_after = [0.0, 9.0], []

    def reward(prompts, texts, columns):
        if trainer.loop.state.rolled_back:
            raise Done
        if prompts[0] in HELD_OUT:  # before training, and after step 3
            return Scores([evaluations.pop(0)] * len(texts), {})
        asked_after.append(len(rows_of(tmp_path / "w")) - 1)
        bad = asked_after[-1] >= 3
        return Scores([float("nan") if bad else 1.0] * len(texts), {}, ["bad"] if bad else [])

    changes = {"steps": 8, "eval_steps": 3, "kl_budget": 50.0, "checkpoint_steps": 2, "reward": reward}
    trainer = make_trainer(tiny_llama, tmp_path / "w", **changes)
    with pytest.raises(Done):
        trainer.train()
    assert asked_after == [0, 1, 2, 3, 4, 5], "steps 4 to 6 are bad: back to step 2"
    assert trainer.state.best.step == best_checkpoint(tmp_path / "w").step == 3


def test_a_damaged_best_policy_is_named_and_not_replaced(tiny_llama, tmp_path, make_trainer):
    from rlhf_cli.errors import DataError

    changes = {"eval_steps": 2, "kl_budget": 50.0, "steps": 4}
    make_trainer(tiny_llama, tmp_path / "w", **changes).train()
    (best,) = (tmp_path / "w").glob("best-*")
    (best / "tensors.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="best policy within `kl_budget`, that of step"):
        make_trainer(tiny_llama, tmp_path / "w", **changes).train()
