"""Scores on disk: what is there is not computed again, whatever a kill left."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.stages.evaluate.scores import ScoreFile


class Counting:
    """Squares row numbers and counts them; fails at row `last`."""

    def __init__(self, last: int | None = None) -> None:
        self.rows: list[int] = []
        self._last = last

    def __call__(self, rows: list[int]) -> list[float]:
        if self._last in rows:
            raise KeyboardInterrupt
        self.rows += rows
        return [row * row + 0.1 for row in rows]


EXPECTED = [row * row + 0.1 for row in range(10)]


def test_an_interrupted_computation_goes_on_after_the_last_chunk(tmp_path):
    file = ScoreFile(tmp_path / "s.jsonl", ProcessGroup())
    with pytest.raises(KeyboardInterrupt):
        file.fill(10, Counting(7), chunk=3)
    rest = Counting()
    assert file.fill(10, rest, chunk=4) == EXPECTED, "another size of chunks does not matter"
    assert rest.rows == [6, 7, 8, 9]
    none = Counting()
    assert file.fill(10, none, chunk=3) == EXPECTED
    assert none.rows == []


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b.replace(b"36.1", b"36.2"), lambda b: b + b"{\n"])
def test_damage_is_said_and_computed_again(damage, tmp_path, capsys):
    path = tmp_path / "s.jsonl"
    ScoreFile(path, ProcessGroup()).fill(10, Counting(), chunk=3)
    path.write_bytes(damage(path.read_bytes()))
    rest, file = Counting(), ScoreFile(path, ProcessGroup())
    left = file.lacks(10)
    assert file.fill(10, rest, chunk=3) == EXPECTED
    assert rest.rows in ([9], [6, 7, 8, 9], [])
    assert len(rest.rows) == left
    assert file.lacks(10) == 0
    assert "torn or damaged" in " ".join(capsys.readouterr().err.split())


def test_the_file_is_read_once(tmp_path, monkeypatch):
    path, reads = tmp_path / "s.jsonl", []
    ScoreFile(path, ProcessGroup()).fill(10, Counting(), chunk=3)
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self) or read(self))
    file = ScoreFile(path, ProcessGroup())
    assert file.lacks(12) == 2
    assert file.fill(10, Counting(), chunk=3) == EXPECTED
    assert reads == [path]


def test_a_stop_comes_between_chunks(tmp_path):
    checks = []

    def stop() -> None:
        checks.append(1)
        if len(checks) == 3:
            raise KeyboardInterrupt

    file = ScoreFile(tmp_path / "s.jsonl", ProcessGroup())
    with pytest.raises(KeyboardInterrupt):
        file.fill(10, Counting(), chunk=4, before_chunk=stop)
    rest = Counting()
    file.fill(10, rest, chunk=4)
    assert rest.rows == [8, 9]
