"""A disk that fills up under the real command: exit 74, the bytes needed, the checkpoint before intact."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.faults.harness import End, SmallRun


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let this process write no larger file (EFBIG), as a quota would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def size_of(run: SmallRun, name: str) -> int:
    return (run.work / "step-00000002" / name).stat().st_size


@pytest.mark.parametrize("room", [0.0, 0.6])
def test_a_checkpoint_larger_than_the_free_space_ends_with_74(broken, expected, room):
    needed = size_of(broken, "tensors.safetensors")
    with largest_file(20_000 + int(room * (needed - 20_000))):
        end = broken.run_here()
    check(broken, end, "cannot write the checkpoint of step 3 in run/.ppo.work: file too large; it needs ")
    told = int(end.stderr.partition("it needs ")[2].partition(" bytes")[0].replace(",", ""))
    assert needed - 20_000 < told < needed + 50_000
    assert sorted(path.name for path in broken.work.glob("*step*")) == ["step-00000001", "step-00000002"]
    again = broken.run_here(FAULT="signal:4")
    assert again.code == 143, again.stderr
    assert broken.stopped() == expected


def test_too_little_room_at_the_start_is_said_before_any_work(broken, monkeypatch):
    usage = __import__("shutil").disk_usage(broken.folder)._replace(free=1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    end = broken.run_here()
    check(broken, end, "1.0 MB free, about ")
    assert broken.events() == []


def check(run: SmallRun, end: End, said: str) -> None:
    assert end.code == 74, end.stderr
    assert said in end.stderr
    assert "hint: free some" in end.stderr
    assert "Traceback" not in end.stderr
    assert run.newest() == 2
    assert not (run.run_dir / "ppo").exists()
