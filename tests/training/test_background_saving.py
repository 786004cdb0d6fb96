"""Checkpoints that are written while training goes on: the same bytes, and whole whatever happens."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DiskError, HostMemoryError, Interrupted
from rlhf_cli.training.checkpoint import store
from rlhf_cli.training.checkpoint.background import BackgroundWriter
from rlhf_cli.training.checkpoint.store import best_checkpoint, latest_checkpoint, save_best, save_checkpoint
from tests.faults.test_checkpoints import tensors
from tests.stops import StopAtStep
from tests.training.test_loop import STEPS, Kill, Walk, loop, saved


class Disk:
    """Holds every write up until it is let go."""

    def __init__(self) -> None:
        self.free, self.begun, self.writing = threading.Event(), list[int](), threading.Event()
        self.fails_at: int | None = None
        self._write = store.write_folder

    def write_folder(self, target: Path, step: int, *arguments: object) -> None:
        self.begun.append(step)
        self.writing.set()
        assert self.free.wait(30)
        if step == self.fails_at:
            raise DiskError(f"cannot write the checkpoint of step {step}: full", hint="free some space")
        self._write(target, step, *arguments)  # type: ignore[arg-type]


@pytest.fixture
def disk(monkeypatch) -> Iterator[Disk]:
    found = Disk()
    monkeypatch.setattr(store, "write_folder", found.write_folder)
    yield found
    found.free.set()
    join()


def join() -> None:
    """Wait for threads of runs that ended as killed ones do."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def writer() -> BackgroundWriter:
    return BackgroundWriter(ProcessGroup())


def soon_free(disk: Disk, seconds: float = 0.2) -> None:
    threading.Timer(seconds, disk.free.set).start()


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "timing.jsonl"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_both_forms_write_the_same_bytes(tmp_path):
    own = writer()
    for name, through in (("waits", None), ("goes on", own)):
        save_checkpoint(tmp_path / name, 1, tensors(1), {"z": 1, "a": [0.1, None]}, writer=through)
        save_best(tmp_path / name, 1, tensors(2), {"score": 0.5}, writer=through)
    own.wait()
    assert files(tmp_path / "waits") == files(tmp_path / "goes on")
    assert len(files(tmp_path / "waits")) == 6


def test_what_is_written_is_a_copy(disk, tmp_path):
    own, weight, state = writer(), torch.arange(6.0).view(2, 3), {"steps": [1]}
    given = {"weight": weight, "tied": weight, "turned": weight.T, "part": weight[:, 1]}
    save_checkpoint(tmp_path, 1, given, state, writer=own)
    assert disk.writing.wait(10)
    expected = {name: one.clone() for name, one in given.items()}
    weight.zero_()
    state["steps"].append(2)
    disk.free.set()
    own.wait()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.state == {"steps": [1]}
    assert all(torch.equal(found.tensors[name], one) for name, one in expected.items())


def test_training_goes_on_and_the_next_save_waits(disk, tmp_path):
    task, seen = Walk(), list[tuple[list[int], list[int]]]()

    def let_go() -> None:
        while len(task.ran) < 2:
            time.sleep(0.001)
        time.sleep(0.05)
        seen.append((list(task.ran), list(disk.begun)))
        disk.free.set()

    threading.Thread(target=let_go).start()
    loop(task, tmp_path, checkpoint_async=True).run()
    assert seen == [([0, 1], [0])], "two steps ran while the first checkpoint was held up, and the second one waited"
    assert disk.begun == [0, 2, 4, 6, 8]
    assert task.ran == list(range(STEPS))
    assert saved(tmp_path) == [6, 8]


@pytest.mark.parametrize("kill_in", [1, 3, 6])
def test_a_run_killed_while_it_writes_resumes_with_the_bytes_of_one_that_waits(kill_in, disk, tmp_path):
    """The thread dies with the process: here before it writes."""
    disk.free.set()
    bad = {1: 1, 4: 1}
    loop(Walk(bad), tmp_path / "whole").run()
    killed = Walk(bad)
    killed.kill_in = kill_in
    plain = killed.step

    def step(number: int, watch) -> object:
        if number == kill_in - 1:
            join()
            disk.free.clear()
            disk.fails_at = kill_in - kill_in % 2
        return plain(number, watch)

    killed.step = step  # type: ignore[method-assign]
    with pytest.raises(Kill):
        loop(killed, tmp_path / "cut", checkpoint_async=True).run()
    disk.free.set()
    join()
    disk.fails_at = None
    newest = saved(tmp_path / "cut")
    left = {step: 1 for step in bad if not newest or step >= newest[-1]}
    loop(Walk(left), tmp_path / "cut", checkpoint_async=True).run()
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_an_error_ends_the_run_at_the_next_step_and_the_one_before_is_whole(disk, tmp_path):
    disk.free.set()
    disk.fails_at = 4
    task = Walk()
    plain = task.step

    def step(number: int, watch) -> object:
        report = plain(number, watch)
        if number == 4:
            join()
        return report

    task.step = step  # type: ignore[method-assign]
    with pytest.raises(DiskError, match=r"cannot write the checkpoint of step 4: full") as caught:
        loop(task, tmp_path, checkpoint_async=True).run()
    assert caught.value.hint == "free some space"
    assert task.ran in ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert saved(tmp_path) == [0, 2]
    disk.fails_at = None
    again = Walk()
    loop(again, tmp_path, checkpoint_async=True).run()
    assert again.ran == [2, 3, 4, 5, 6, 7]


def test_a_disk_that_is_full_is_said_with_the_bytes_that_are_needed(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    own = writer()
    monkeypatch.setattr("os.fsync", full)
    save_checkpoint(tmp_path, 2, tensors(2), {}, writer=own)
    with pytest.raises(DiskError, match=r"of step 2 in .*: no space left on device; it needs 1\d\d bytes"):
        own.wait()
    own.wait()  # it is said once
    assert not list(tmp_path.iterdir())


def test_a_signal_waits_for_what_is_written(disk, tmp_path):
    soon_free(disk)
    with pytest.raises(Interrupted):
        loop(Walk(), tmp_path, stop=StopAtStep(2), checkpoint_async=True).run()
    assert saved(tmp_path) == [0, 2]


def test_the_end_waits_and_an_error_of_the_last_writes_is_not_lost(disk, tmp_path):
    soon_free(disk)
    disk.fails_at = 6
    with pytest.raises(DiskError, match="of step 6"):
        loop(Walk(), tmp_path, checkpoint_async=True).run()
    assert saved(tmp_path) == [2, 4]


def test_another_error_leaves_the_checkpoint_before_it_whole(disk, tmp_path, capsys):
    soon_free(disk)
    task = Walk()

    def step(number: int, watch) -> object:
        raise ValueError("a bug")

    task.step = step  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="a bug"):
        loop(task, tmp_path / "one", checkpoint_async=True).run()
    assert saved(tmp_path / "one") == [0]
    disk.free.clear()
    soon_free(disk)
    disk.fails_at = 0
    with pytest.raises(ValueError, match="a bug"):
        loop(task, tmp_path / "two", checkpoint_async=True).run()
    assert "the last checkpoint was not written: cannot write the checkpoint of step 0: full" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_roll_back_reads_what_is_still_being_written(disk, tmp_path):
    disk.free.set()
    task = Walk({4: 1, 5: 1, 6: 1})
    plain = task.step

    def step(number: int, watch) -> object:
        if number == 3 and not task.ran.count(3):
            join()
            disk.free.clear()  # for the checkpoint of step 4
        elif number == 6 and not disk.free.is_set():
            soon_free(disk)
        return plain(number, watch)

    task.step = step  # type: ignore[method-assign]
    assert loop(task, tmp_path, checkpoint_async=True).run().rolled_back
    assert task.ran == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]


def test_the_best_is_written_before_the_checkpoint_that_refers_to_it(disk, tmp_path):
    own = writer()
    soon_free(disk)
    save_best(tmp_path, 2, tensors(2), {"score": 0.5}, writer=own)
    save_checkpoint(tmp_path, 2, tensors(2), {"best": 2}, writer=own)
    assert (tmp_path / "best-00000002").is_dir(), "the second one waited"
    own.wait()
    assert best_checkpoint(tmp_path) is not None
    assert latest_checkpoint(tmp_path) is not None


def test_a_copy_that_finds_no_memory_ends_the_run_with_the_checkpoint_before(tmp_path, monkeypatch):
    own = writer()
    save_checkpoint(tmp_path, 1, tensors(1), {}, writer=own)

    def full(*given: object, **more: object) -> torch.Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty_like", full)
    with pytest.raises(HostMemoryError, match="no host memory for the copy") as caught:
        save_checkpoint(tmp_path, 2, tensors(2), {}, writer=own)
    assert "--set checkpoint_async=false" in (caught.value.hint or "")
    assert saved(tmp_path) == [1]
    assert not own.is_writing


def test_an_error_of_the_thread_that_processes_do_not_agree_on_ends_this_one(monkeypatch):
    """Threads of the others may still wait for what this one did not send."""
    processes = ProcessGroup()
    monkeypatch.setattr(processes, "any", lambda flag: True)
    own = BackgroundWriter(processes)

    def broken(take: object) -> None:
        raise RuntimeError("connection closed by peer")

    own.begin(tensors(1), [], broken)
    join()
    with pytest.raises(RuntimeError, match="closed by peer"):
        own.check()


def test_who_waits_at_the_end_is_told_for_what(disk, tmp_path, capsys):
    soon_free(disk, 1.0)
    with pytest.raises(Interrupted):
        loop(Walk(), tmp_path, stop=StopAtStep(1), checkpoint_async=True).run()
    assert "waiting for the checkpoint that is being written" in capsys.readouterr().err
    assert saved(tmp_path) == [0, 1]


KEPT = """
import sys
from pathlib import Path
import torch
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.memory import keep_freed_memory
from rlhf_cli.training.checkpoint.background import BackgroundWriter
from rlhf_cli.training.checkpoint.store import save_checkpoint

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1000

keep_freed_memory()
tensors = {str(number): torch.ones(5_000_000) for number in range(15)}
writer = BackgroundWriter(ProcessGroup())
found = [resident()]
for step in (1, 2):
    save_checkpoint(Path(sys.argv[1]), step, tensors, {}, writer=writer)
    pin = torch.ones(50_000)  # above the copies
    writer.wait()
    found.append(resident())
print(*found)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)
def test_the_memory_of_a_copy_is_given_back_once_it_is_written(tmp_path):
    """300 MB, where glibc was told to keep what is freed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", KEPT, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, once, twice = map(float, done.stdout.split())
    assert once < before + 100
    assert twice < before + 100
