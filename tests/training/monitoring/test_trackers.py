"""Trackers: what they are told, that resumed runs go on in them, and that none of them can end a training run.

TensorBoard is the real one, read back by its own reader. W&B and trackio are stand-ins with the calls that we make of
theirs: what is tested is what they are told.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.pipeline.preflight import preflight
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages import common
from rlhf_cli.stages.base import StageContext
from rlhf_cli.training.monitoring import trackers as module
from rlhf_cli.training.monitoring.metrics_log import MetricsLog
from rlhf_cli.training.monitoring.tracker_backends import TensorBoard
from rlhf_cli.training.monitoring.trackers import TrackedRun, Trackers
from tests.stages.context import stage_context


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    (tmp_path / "work").mkdir()
    return TrackedRun(
        project="ours",
        group="mine",
        stage="ppo",
        folder=tmp_path / "tracking" / "ppo",
        state=tmp_path / "work" / "tracking.json",
        settings={"ppo.kl_coef": 0.05, "ppo.kl_in": "reward"},
    )


class FakeRun:
    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


class FakeWandB(ModuleType):
    """As much of wandb as we call; `online_step` is what its server would know of a run that is resumed."""

    class Settings(SimpleNamespace):
        model_fields = dict.fromkeys(["console", "disable_git", "disable_code", "save_code", "x_disable_stats"])

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict] = []
        self.runs: list[FakeRun] = []
        self.online_step = 0

    def init(self, **arguments) -> FakeRun:
        self.inits.append(arguments)
        self.runs.append(FakeRun(self.online_step))
        return self.runs[-1]

    class Histogram:
        def __init__(self, np_histogram) -> None:
            self.counts, self.edges = np_histogram


class FakeTrackio(ModuleType):
    Histogram = FakeWandB.Histogram

    def __init__(self) -> None:
        super().__init__("trackio")
        self.inits: list[dict] = []
        self.runs: list[FakeRun] = []

    def init(self, project, name=None, config=None, resume="never", auto_log_gpu=None, auto_log_cpu=None) -> FakeRun:
        self.inits.append({"project": project, "name": name, "resume": resume, "config": config})
        self.inits[-1] |= {"cpu": auto_log_cpu, "gpu": auto_log_gpu}
        self.runs.append(FakeRun())
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch) -> FakeWandB:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    return fake


@pytest.fixture
def trackio(monkeypatch) -> FakeTrackio:
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    return fake


def write(path: Path, trackers: Trackers, steps: range, *, after_step: int = 0, scale: float = 1.0) -> None:
    with MetricsLog(path, after_step=after_step, trackers=trackers) as log:
        for step in steps:
            log.write(step, {"loss": scale * step, "bad": math.nan}, {"length": [step, step + 1, step + 1]})


def read_tensorboard(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_tensorboard_reads_back_what_was_written(run, tmp_path):
    write(tmp_path / "metrics.jsonl", Trackers(["tensorboard"], run), range(1, 4))
    found = read_tensorboard(run.folder)
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert found.Tags()["scalars"] == ["loss"]  # what is not finite is omitted
    newest = found.Histograms("histograms/length")[-1]
    value = newest.histogram_value
    assert (newest.step, value.min, value.max, value.num, value.sum) == (3, 2.5, 4.5, 3, 11)
    assert value.sum_squares == 9 + 16 + 16
    assert (list(value.bucket_limit), list(value.bucket)) == ([3.5, 4.5], [1, 2])
    text = found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| ppo.kl_coef | 0.05 |" in text


def test_steps_done_again_do_not_double_in_tensorboard(run, tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, Trackers(["tensorboard"], run), range(1, 6))
    write(path, Trackers(["tensorboard"], run), range(4, 7), after_step=3, scale=10.0)
    events = read_tensorboard(run.folder).Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_a_stage_begun_anew_hides_what_it_was_in_tensorboard(run, tmp_path):
    write(tmp_path / "a.jsonl", Trackers(["tensorboard"], run), range(6))
    anew = replace(run, state=tmp_path / "other.json")  # the work folder is gone
    write(tmp_path / "b.jsonl", Trackers(["tensorboard"], anew), range(2), scale=10.0)
    events = read_tensorboard(run.folder).Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(0, 0), (1, 10)]


def test_figures_up_to_a_checkpoint_survive_a_kill(run, tmp_path, monkeypatch):
    trackers = Trackers(["tensorboard"], run)
    log = MetricsLog(tmp_path / "metrics.jsonl", trackers=trackers)
    flushes: list[int] = []
    flush = TensorBoard.flush
    monkeypatch.setattr(TensorBoard, "flush", lambda self: flushes.append(1) or flush(self))
    for step in range(1, 5):
        log.write(step, {"loss": 1.0})
    assert not flushes  # which would make fast steps slow
    log.position()  # as a checkpoint takes it; nothing is closed
    assert flushes == [1]
    assert [event.step for event in read_tensorboard(run.folder).Scalars("loss")] == [1, 2, 3, 4]
    log.close()


def test_wandb_is_told_of_the_run_and_of_nothing_else(run, tmp_path, wandb):
    write(tmp_path / "metrics.jsonl", Trackers(["wandb"], run), range(1, 3))
    (arguments,) = wandb.inits
    settings = vars(arguments.pop("settings"))
    assert arguments == {
        "project": "ours",
        "name": "mine-ppo",
        "group": "mine",
        "job_type": "ppo",
        "id": json.loads(run.state.read_text())["id"],
        "resume": "allow",
        "config": {"ppo.kl_coef": 0.05, "ppo.kl_in": "reward"},
    }
    # Only settings that this version knows, and each of them keeps something of the machine to itself.
    assert settings == {
        "console": "off", "disable_git": True, "disable_code": True, "save_code": False, "x_disable_stats": True,
    }  # fmt: skip
    (made,) = wandb.runs
    assert [(step, values["loss"], "bad" in values) for step, values in made.logged] == [(1, 1, False), (2, 2, False)]
    assert made.logged[0][1]["histograms/length"].counts == [1, 2]
    assert made.finished == 1


@pytest.mark.parametrize(("online_step", "expected"), [(0, [6]), (5, [5, 6])], ids=["offline", "online"])
def test_a_resumed_run_goes_on_in_the_same_wandb_run(run, tmp_path, wandb, online_step, expected):
    path = tmp_path / "metrics.jsonl"
    write(path, Trackers(["wandb"], run), range(1, 6))
    wandb.online_step = online_step  # the server has not seen step 5
    write(path, Trackers(["wandb"], run), range(4, 7), after_step=3)
    first, second = wandb.inits
    assert first["id"] == second["id"]
    assert [step for step, _ in wandb.runs[1].logged] == expected


def test_a_resumed_run_goes_on_in_the_same_trackio_run(run, tmp_path, trackio):
    path = tmp_path / "metrics.jsonl"
    write(path, Trackers(["trackio"], run), range(1, 6))
    write(path, Trackers(["trackio"], run), range(4, 7), after_step=3)
    assert [made["resume"] for made in trackio.inits] == ["never", "allow"]
    assert {(made["project"], made["name"], made["cpu"], made["gpu"]) for made in trackio.inits} == {
        ("ours", "mine-ppo", False, False)
    }
    assert [[step for step, _ in made.logged] for made in trackio.runs] == [[1, 2, 3, 4, 5], [6]]


def test_a_tracker_that_fails_is_named_once_and_training_goes_on(run, tmp_path, wandb, trackio, monkeypatch, capsys):
    monkeypatch.setenv("SOME_API_KEY", "sesame-open-sesame")

    def fail(self, values, step):
        if step == 2:
            raise OSError("no network: https://u:sesame-open-sesame@host/?token=abc&x=1\nmore")
        self.logged.append((step, values))

    monkeypatch.setattr(FakeRun, "log", fail)
    write(tmp_path / "metrics.jsonl", Trackers(["wandb", "tensorboard"], run), range(1, 5))
    said = capsys.readouterr().err
    assert said.count("warning:") == 1
    assert "wandb failed and is dropped" in said
    assert "https://u:***@host/?token=***&x=1" in said
    assert [step for step, _ in wandb.runs[0].logged] == [1]
    assert [event.step for event in read_tensorboard(run.folder).Scalars("loss")] == [1, 2, 3, 4]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_tracker_that_cannot_begin_is_left_out_and_stays_so(run, tmp_path, wandb, monkeypatch, capsys):
    monkeypatch.setattr(FakeWandB, "init", lambda self, **_: 1 / 0)
    trackers = Trackers(["wandb"], run)
    write(tmp_path / "metrics.jsonl", trackers, range(1, 4))
    write(tmp_path / "metrics.jsonl", trackers, range(3, 5), after_step=2)  # went back after a divergence
    assert capsys.readouterr().err.count("warning:") == 1


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"id": 3}', b"\xff", b'{"id": "../../x"}'])
def test_a_damaged_id_begins_a_new_run(run, tmp_path, trackio, capsys, content):
    run.state.write_bytes(content)
    write(tmp_path / "metrics.jsonl", Trackers(["trackio"], run), range(1, 2))
    assert trackio.inits[0]["resume"] == "never"
    assert str(run.state) in capsys.readouterr().err
    assert len(json.loads(run.state.read_text())["id"]) == 12


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)], ids=["nothing", "a folder of that name"])
def test_absent_packages_are_named_before_any_stage_starts(monkeypatch, found):
    monkeypatch.setattr(module, "find_spec", lambda name: found)
    recipe = Recipe.model_validate({"tracking": {"trackers": ["wandb", "tensorboard"]}})
    with pytest.raises(UsageError) as caught:
        preflight(recipe, [])
    assert caught.value.message == "`tracking.trackers` names wandb, tensorboard, which are not installed"
    assert caught.value.hint == "`pip install wandb 'rlhf-cli[tensorboard]'`, or remove them from the recipe"


def test_a_stage_without_trackers_asks_for_no_package(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    preflight(Recipe(), [])


def context(tmp_path: Path, **tracking) -> StageContext:
    """Of the `ppo` stage of a recipe whose reward has an address."""
    rewards = [{"url": "http://user:pass@127.0.0.1:9/"}]
    recipe = Recipe.model_validate(
        {"name": "mine", "tracking": tracking, "ppo": {"rewards": rewards, "reward_model": "secret/folder"}}
    )
    output, work = tmp_path / ".ppo.output", tmp_path / ".ppo.work"
    return stage_context("ppo", recipe, output=output, work=work)


def test_a_stage_tells_trackers_its_settings_and_no_addresses(tmp_path, trackio):
    made = context(tmp_path, trackers=["trackio"], project="p")
    made.work.mkdir()
    with common.metrics_log(made)(tmp_path / "metrics.jsonl", after_step=0) as log:
        log.write(1, {"loss": 1.0})
    (told,) = trackio.inits
    assert (told["project"], told["name"]) == ("p", "mine-ppo")
    assert told["config"]["ppo.kl_coef"] == 0.05
    assert told["config"]["seed"] == 0
    assert "://" not in json.dumps(told)
    assert "secret/folder" not in json.dumps(told)


def test_only_the_main_process_of_a_stage_with_trackers_has_any(tmp_path, monkeypatch):
    assert common.trackers(context(tmp_path)) is None
    assert common.trackers(context(tmp_path, trackers=["tensorboard"])) is not None
    monkeypatch.setenv("RANK", "1")
    assert common.trackers(context(tmp_path, trackers=["tensorboard"])) is None
