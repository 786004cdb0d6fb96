"""`model.precision: auto`: measured once per stage, recorded, and the same in all processes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.models import precision_trial
from rlhf_cli.models.precision_trial import bfloat16_speed, faster_precision
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.base import PRECISION_RECORD
from rlhf_cli.stages.precision import decide_precision
from tests.stages.context import stage_context

CPU = torch.device("cpu")


@pytest.fixture
def speeds(monkeypatch):
    """What the trial finds, by width; a list of the widths that were tried."""
    found, tried = {}, []

    def speed(device, width, trains):
        tried.append(width if trains == "adapter" else (width, trains))
        return found[width]

    monkeypatch.setattr(precision_trial, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(precision_trial, "bfloat16_speed", speed)
    return found, tried


def context(tmp_path, model, **settings):
    section = {"path": str(model), "device": "cpu"} | settings
    recipe = Recipe.model_validate({"model": section, "sft": {"data": "d.jsonl"}})
    (tmp_path / "work").mkdir(exist_ok=True)
    given = {"base": "build" if model is None else model, "demonstrations": "d.jsonl"}
    return stage_context("sft", recipe, output=tmp_path / "out", work=tmp_path / "work", **given)


def decided(*arguments, **settings) -> str:
    return decide_precision(context(*arguments, **settings)).recipe.model.precision


def test_the_faster_precision_is_taken_and_said(tiny_llama, tmp_path, speeds, capsys):
    found, _ = speeds
    for speed, expected in ((0.8, "float32"), (1.05, "float32"), (1.5, "bfloat16")):
        found[32] = speed
        assert decided(tmp_path, tiny_llama) == expected
        assert f"precision {expected}: bfloat16 is {speed:.1f} times as fast" in capsys.readouterr().err
        (tmp_path / "work" / PRECISION_RECORD).unlink()


def test_a_resumed_stage_keeps_its_precision(tiny_llama, tmp_path, speeds):
    found, tried = speeds
    found[32] = 2.0
    assert decided(tmp_path, tiny_llama) == "bfloat16"
    found[32] = 0.5
    assert decided(tmp_path, tiny_llama) == "bfloat16"
    assert tried == [32]
    (tmp_path / "work" / PRECISION_RECORD).write_text("bfl")  # written by half
    assert decided(tmp_path, tiny_llama) == "float32"


def test_nothing_is_tried_where_nothing_is_to_decide(tiny_llama, tmp_path, speeds, monkeypatch):
    _, tried = speeds
    assert decided(tmp_path, tiny_llama, precision="bfloat16") == "bfloat16"
    assert not list((tmp_path / "work").iterdir())
    assert decided(tmp_path, tiny_llama, dtype="bfloat16") == "bfloat16"
    (tmp_path / "work" / PRECISION_RECORD).unlink()
    monkeypatch.setattr(precision_trial, "has_bfloat16", lambda device: False)
    assert decided(tmp_path, tiny_llama) == "float32"
    assert tried == []


@pytest.mark.parametrize(
    ("asked", "emulates", "warns"),
    [("bfloat16", True, True), ("bfloat16", False, False), ("float32", True, False)],
)
def test_an_emulated_precision_is_warned_of(tiny_llama, tmp_path, monkeypatch, capsys, asked, emulates, warns):
    monkeypatch.setattr(precision_trial, "has_bfloat16", lambda device: not emulates)
    assert decided(tmp_path, tiny_llama, precision=asked) == asked
    assert ("has no bfloat16 instructions" in capsys.readouterr().err) == warns


def test_a_model_that_is_yet_to_be_built_has_the_width_of_its_settings(tmp_path, speeds):
    found, tried = speeds
    found[64] = 3.0
    assert decided(tmp_path, None, path=None, build={"hidden_size": 64}) == "bfloat16"
    assert tried == [64]


def test_every_process_takes_the_precision_of_rank_0(tiny_llama, tmp_path, speeds, monkeypatch):
    _, tried = speeds
    monkeypatch.setattr(ProcessGroup, "is_main", False)
    monkeypatch.setattr(ProcessGroup, "all_gather_object", lambda self, item: ["bfloat16", item])
    assert decided(tmp_path, tiny_llama) == "bfloat16"
    assert tried == []
    assert not list((tmp_path / "work").iterdir())


def test_the_record_alone_is_no_work_to_resume(tmp_path):
    run = RunDirectory(tmp_path)
    run.begin("sft", {"settings": {}}, resume=False)
    (run.work("sft") / PRECISION_RECORD).write_text("float32\n")
    assert run.began("sft") is None
    (run.work("sft") / "checkpoint").write_text("")
    assert run.began("sft") == {"settings": {}}


def test_the_trial_times_a_layer_in_both_precisions(monkeypatch):
    times = {(torch.float32, torch.float32): 3.0, (torch.bfloat16, torch.bfloat16): 2.0}  # of weights and of autocast
    monkeypatch.setattr(precision_trial, "layer_seconds", lambda layer, precision: times[layer.dtype, precision])
    assert bfloat16_speed.__wrapped__(CPU, 48) == 1.5
    monkeypatch.undo()
    for trains in ("nothing", "adapter", "all"):
        assert 0.01 < bfloat16_speed(CPU, 20, trains) < 100
    assert faster_precision(torch.device("meta"), 64)[0] == torch.float32


@pytest.mark.parametrize(
    ("trains", "trained"),
    [
        pytest.param("nothing", 0, id="frozen"),
        pytest.param("adapter", 14, id="A and B"),
        pytest.param("all", 11, id="all"),
    ],
)
def test_the_trial_trains_what_the_stage_trains(trains, trained, monkeypatch):
    """Of 7 linear layers, 2 norms of the layer, the last norm and the embeddings."""
    seen = []
    monkeypatch.setattr(
        precision_trial, "layer_seconds", lambda layer, precision: seen.append((layer, precision)) or 1.0
    )
    bfloat16_speed.__wrapped__(CPU, 32, trains)
    for layer, precision in seen[:2]:
        assert sum(weight.requires_grad for weight in layer.parameters()) == trained
        products = [module.weight.dtype for module in layer.modules() if type(module) is torch.nn.Linear]
        assert precision in products


def test_all_weights_are_tried_where_all_are_trained(tiny_llama, tmp_path, speeds):
    found, tried = speeds
    found[32] = 2.0
    full = context(tmp_path, tiny_llama)
    settings = full.settings.model_copy(update={"adapter": "none"})
    decide_precision(replace(full, settings=settings))
    assert tried == [(32, "all")]


@pytest.mark.parametrize("trains", ["nothing", "adapter", "all"])
def test_a_trial_draws_no_random_number(trains):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    bfloat16_speed.__wrapped__(CPU, 32, trains)
    assert torch.equal(torch.get_rng_state(), before)
