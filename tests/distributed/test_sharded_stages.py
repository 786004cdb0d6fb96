"""`label`, `best-of-n` and `evaluate` with `model.sharding: fsdp` write what one process with whole models writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.distributed.process_group import ProcessGroup
from tests.distributed.sharded_stages import CASES, run_case, stand_ins, write_inputs
from tests.distributed.test_sharding import started_by_rank, wait_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs, and what two processes wrote of each case in `two`, and in `again` after a part of it was lost."""
    folder = tmp_path_factory.mktemp("stages")
    write_inputs(folder)
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


def written(folder: Path) -> dict[str, Any]:
    """Return the JSON of each file of an artifact."""
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        if path.suffix == ".jsonl"
        else json.loads(path.read_text())
        for path in folder.iterdir()
        if path.suffix in (".json", ".jsonl")
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
