"""Stages with `model.sharding: fsdp` divide their models, and write what one process with whole models writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.distributed.process_group import ProcessGroup
from tests.distributed.sharded_stages import CASES, run_case, stand_ins, write_inputs
from tests.distributed.test_sharding import started_by_rank, wait_for

DIVIDED: dict[str, set[str]] = {
    "label by a reward model": {"llama, policy", "llama, reward model"},
    "label given items": {"classifier, reward model"},
    "label by active learning": {"llama, policy", "llama, reward model", "classifier, reward model"},
    "best-of-n": {"llama, policy", "llama, reward model", "classifier, reward model"},
    "evaluate": {"policy, policy", "llama, policy", "other, policy", "llama, reward model"},
    "evaluate one prompt": {"policy, policy", "llama, policy"},
    "evaluate encoder-decoders": {"built, policy", "t5, policy", "built, untrained policy"},
    "train-rm": {"llama, policy", "llama, reward model"},
    "label, server": {"llama, policy"},
    "label, engine": {"llama, policy"},
    "evaluate, server": {"policy, policy", "llama, policy", "llama, reward model"},
    "evaluate, engine": {"policy, policy", "llama, policy", "llama, reward model"},
    "evaluate, shared engine": {"policy, policy", "llama, policy", "other, policy", "llama, reward model"},
}
"""Case -> the models that it divides: folder and kind. The reward model `adapter` is one on `llama`; an encoder is not
divided."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """The inputs, and what two processes wrote of each case in `two`, and in `again` after a part of it was lost."""
    folder = tmp_path_factory.mktemp("stages")
    write_inputs(folder, tiny_bert)
    wait_for(started_by_rank("sharded_stages.py", [folder, *CASES], 2))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_divided_models_write_what_one_process_writes(case: str, folder: Path, tmp_path: Path):
    """With uneven shares, a process without prompts, and completions and scores that only one process had kept."""
    with stand_ins(case, folder, ProcessGroup()) as generation:
        generation.pop("tensor_parallel_size", None)
        run_case(folder, case, tmp_path / "one", generation, is_sharded=False)
    expected = written(tmp_path / "one" / "output")
    assert expected, "nothing would be compared"
    for place in ("two", "again"):
        found = written(folder / place / case / "output")
        assert found.keys() == expected.keys()
        for name, lines in expected.items():
            assert_close(found[name], lines, f"{place}: {name}")


@pytest.mark.parametrize("case", CASES)
def test_every_model_of_a_case_is_divided(case: str, folder: Path):
    """Whole models would give the same results."""
    assert set(json.loads((folder / "two" / case / "divided.json").read_text())) == DIVIDED[case]


def test_an_error_of_one_process_while_it_draws_ends_all_and_is_named(folder: Path):
    """Batches of one prompt with three completions: process 0 had three, and process 1 failed in the second of two."""
    ends = [(folder / f"failed-{number}.txt").read_text() for number in range(2)]
    assert ends == ["lost another process", "the logits of process 1 are not finite"]
    kept = [
        len((folder / "failed/work" / name).read_text().splitlines()) for name in ("samples.jsonl", "samples-1.jsonl")
    ]
    assert kept == [9, 3]
    assert not list((folder / "failed/output").glob("rankings*"))


def written(folder: Path) -> dict[str, Any]:
    """Return the JSON of each file of an artifact."""
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        if path.suffix == ".jsonl"
        else json.loads(path.read_text())
        for path in folder.iterdir()
        if path.suffix in (".json", ".jsonl") and path.name != "timing.jsonl"
    }


def assert_close(found: Any, expected: Any, where: str) -> None:
    """Texts are equal, and numbers differ by 1e-5 at most."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_close(found[number], value, f"{where}.{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5), where
    else:
        assert found == expected, where
