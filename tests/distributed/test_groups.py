"""Collectives among some of the processes of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.test_sharding import started_by_rank


@pytest.mark.slow
@pytest.mark.parametrize(("count", "size"), [(2, 2), (4, 2)])
def test_a_group_of_consecutive_processes_exchanges_among_itself_alone(count: int, size: int, tmp_path: Path):
    for process in started_by_rank("groups.py", [tmp_path, size], count):
        said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    for rank in range(count):
        found = json.loads((tmp_path / f"{size}-{rank}.json").read_text())
        first = rank - rank % size
        group = range(first, first + size)
        assert found == {
            "place": [rank - first, size],
            "gathered": ["x" * member for member in group],
            "sum": sum(2**member for member in group),
            "mapped": [10 * (first + number % size) + number for number in range(5)],
            "again": [*group],
            "made": 1,
            "everyone": [*range(count)],
        }
