"""The end of `rlhf start`: how long the run takes, or why that is not known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_cli.cli.plan_report import show_plan
from rlhf_cli.errors import ModelError
from rlhf_cli.pipeline import plan
from rlhf_cli.pipeline.run_plan import RunPlan, StagePlan
from rlhf_cli.stages.trial import Rates
from rlhf_cli.stages.workload import Workload
from rlhf_cli.start.duration import about, say_how_long
from rlhf_cli.start.writing import write_recipe
from tests.start.conftest import said


def stage(name: str, seconds: float | None) -> StagePlan:
    """A stage whose only work is to load a model in so many seconds."""
    if seconds is None:
        return StagePlan(name, "run", "")
    rates = Rates(load=seconds, train=0.0, forward=0.0, per_weight=0.0, per_byte=0.0)
    return StagePlan(name, "run", "", workload=Workload(1, "prompts", (), loads=1), rates=rates)


def test_the_end_says_how_long_the_run_takes(draft, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        plan,
        "plan_run",
        lambda *_, **__: RunPlan(
            tmp_path, [stage("label", 250), stage("train-rm", 1.0), stage("ppo", 7300), stage("evaluate", None)],
            "cpu", 1, 1, True,
        ),
    )  # fmt: skip
    made = draft()
    path = tmp_path / "mine.yaml"
    write_recipe(made, path, "rlhf start")
    said(capsys)
    say_how_long(made, path)
    assert said(capsys).endswith(
        "The run takes about 2 h 06 min here: label 4 min, ppo 2 h 02 min; without `evaluate` and the time in which "
        "you rank"
    )


def test_it_says_that_other_processes_made_the_measurement_slower(draft, tmp_path, capsys, monkeypatch):
    made, path = draft(), tmp_path / "mine.yaml"
    write_recipe(made, path, "rlhf start")
    for others in (None, "other processes used 1.3 of 2 processor cores"):
        run = RunPlan(tmp_path, [stage("ppo", 600)], "cpu", 1, 1, True, others=others)
        monkeypatch.setattr(plan, "plan_run", lambda *_, found=run: found)
        said(capsys)
        say_how_long(made, path)
        text = said(capsys)
        assert ("warning:" in text) == (others is not None)
        assert others is None or others in text
        show_plan(run)
        assert others is None or f"warning: {others}" in " ".join(capsys.readouterr())


def test_a_long_run_is_offered_with_settings_that_shorten_it(draft, tmp_path, capsys, monkeypatch):
    """The time of the shorter run is that of its own work, at the speed that was measured."""
    found = {}

    def planned(loaded, run_dir, selection, *, trial=True):
        found[trial] = (loaded.recipe.ppo.steps, loaded.recipe.value("sampling.max_new_tokens"))
        ppo = stage("ppo", 7300 if trial else 1)
        return RunPlan(tmp_path, [ppo if trial else replace(ppo, rates=None, workload=lighter)], "cpu", 1, 1, trial)

    lighter = Workload(1, "prompts", (), loads=0.1)
    monkeypatch.setattr(plan, "plan_run", planned)
    made, path = draft("ppo.steps=40", "sampling.max_new_tokens=200"), tmp_path / "mine.yaml"
    write_recipe(made, path, "rlhf start")
    said(capsys)
    say_how_long(made, path)
    assert said(capsys).endswith(
        "A shorter first run takes 12 min at most, with more completions cut off: add `--set "
        f"sampling.max_new_tokens=128 --set ppo.steps=5` to `rlhf label {path}` and to `rlhf run {path}`"
    )
    assert found == {True: (40, 200), False: (5, 128)}

    lighter = replace(lighter, loads=0.6)
    say_how_long(made, path)
    assert "shorter" not in said(capsys), "it saves little"
    monkeypatch.setattr(plan, "plan_run", lambda *_: RunPlan(tmp_path, [stage("ppo", 600)], "cpu", 1, 1, True))
    say_how_long(made, path)
    assert "shorter" not in said(capsys), "the run is short"


def test_a_run_that_does_not_fit_has_no_time(draft, tmp_path, capsys, monkeypatch):
    stages = [stage("sft", 9000), replace(stage("ppo", 7300), fits=False), replace(stage("evaluate", 1), fits=False)]
    monkeypatch.setattr(plan, "plan_run", lambda *_, **__: RunPlan(tmp_path, stages, "cpu", 1, 1, True))
    made, path = draft(), tmp_path / "mine.yaml"
    write_recipe(made, path, "rlhf start")
    said(capsys)
    say_how_long(made, path)
    assert said(capsys).endswith(
        f"`ppo` and `evaluate` do not fit the memory of this machine: `rlhf plan {path}` names settings to change"
    )


def test_a_trial_that_fails_or_is_skipped_recommends_the_plan(draft, tmp_path, capsys, monkeypatch):
    made, path = draft(), tmp_path / "mine.yaml"
    write_recipe(made, path, "rlhf start")
    for error, words in (
        (KeyboardInterrupt(), "was not measured"),
        (ModelError("no memory"), "not known: no memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not known: the memory of this machine did not"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(plan, "plan_run", fail)
        said(capsys)
        say_how_long(made, path)
        text = said(capsys)
        assert words in text
        assert "rlhf plan" in text


def test_the_real_trial_gives_a_time_and_shows_none_of_its_messages(draft, tmp_path, capsys):
    made, path = draft("ppo.prompts_per_step=4", "sampling.max_new_tokens=8"), tmp_path / "mine.yaml"
    write_recipe(made, path, "rlhf start")
    said(capsys)
    say_how_long(made, path)
    text = said(capsys)
    assert "Ctrl-C skips it. The run takes about " in text
    assert "precision" not in text
    assert not (tmp_path / "runs").exists()


def test_durations_are_as_rough_as_the_estimate():
    assert [about(seconds) for seconds in (3.4, 59.4, 59.6, 451, 3600, 7830)] == [
        "3 s", "59 s", "1 min", "8 min", "1 h 00 min", "2 h 10 min",
    ]  # fmt: skip


@pytest.mark.parametrize(("weights", "reason"), [(None, "not on this machine yet"), (10**13, "large for the memory")])
def test_nothing_is_loaded_that_should_not_be_here(draft, capsys, monkeypatch, weights, reason):
    made = draft()
    monkeypatch.setattr(plan, "plan_run", None)  # is not called
    say_how_long(replace(made, model=replace(made.model, weights=weights)), Path("mine.yaml"))
    text = said(capsys)
    assert reason in text
    assert "`rlhf plan mine.yaml`" in text
