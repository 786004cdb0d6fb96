"""Step checkpoints: atomic, damage of every kind is reported and skipped, several processes agree."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli.errors import DiskError, DivergedError, UsageError
from rlhf_cli.training.checkpoint import files as checkpoint_files
from rlhf_cli.training.checkpoint.store import (
    best_checkpoint,
    latest_checkpoint,
    save_best,
    save_checkpoint,
)

FILES = ("tensors.safetensors", "state.json", "SHA256SUMS")


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((3, 5), float(step)),
        "count": torch.tensor(float(step)),
        "rng": torch.arange(7, dtype=torch.uint8),
        "half": torch.linspace(0, 1, 9).bfloat16(),
        "empty": torch.zeros(0, 4),
        "is_done": torch.tensor([True, False]),
    }


def save(folder: Path, step: int, **options) -> None:
    save_checkpoint(folder, step, tensors(step), {"step": step}, **options)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << 3
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "one bit flipped": flip_one_bit,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


def test_a_checkpoint_reads_back_unchanged(tmp_path):
    save(tmp_path, 4)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (4, {"step": 4})
    assert found.tensors.keys() == tensors(4).keys()
    for name, expected in tensors(4).items():
        assert found.tensors[name].dtype == expected.dtype
        assert torch.equal(found.tensors[name], expected)
    assert steps(tmp_path) == ["step-00000004"], "nothing temporary is left"
    assert load_file(tmp_path / "step-00000004/tensors.safetensors").keys() == tensors(4).keys()


def test_tensors_that_share_memory_or_are_not_contiguous_are_written_each_for_itself(tmp_path):
    weight = torch.arange(6.0).view(2, 3)
    save_checkpoint(tmp_path, 1, {"a": weight, "tied": weight, "turned": weight.T, "part": weight[:, 1]}, {})
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert torch.equal(found.tensors["tied"], weight)
    assert torch.equal(found.tensors["turned"], weight.T)
    assert torch.equal(found.tensors["part"], weight[:, 1])


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_few_are_kept(tmp_path, keep):
    for step in range(1, 6):
        save(tmp_path, step, keep=keep)
    assert steps(tmp_path) == [f"step-0000000{step}" for step in range(6 - keep, 6)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_is_named_and_the_one_before_is_taken(tmp_path, capfd, name, kind):
    save(tmp_path, 1)
    save(tmp_path, 2)
    DAMAGE[kind](tmp_path / "step-00000002" / name)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    said = capfd.readouterr().err.replace("\n", "")
    assert "skipping the damaged checkpoint" in said
    assert "step-00000002: " in said
    if name != "SHA256SUMS" or kind != "one bit flipped":  # that changes a sum or a name, which tells of another file
        assert name in said.rpartition("step-00000002")[2]
    assert "starting from the beginning" not in said


def test_every_flipped_bit_of_the_sums_is_harmless_or_seen(tmp_path):
    save(tmp_path, 1)
    sums = tmp_path / "step-00000001/SHA256SUMS"
    whole = sums.read_bytes()
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        sums.write_bytes(content)
        with pytest.raises(checkpoint_files.DamagedCheckpoint):
            checkpoint_files.read_folder(sums.parent)


def test_without_an_intact_checkpoint_training_starts_anew(tmp_path, capfd):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "not there") is None
    assert capfd.readouterr().err == ""
    (tmp_path / "step-00000003").mkdir()
    assert latest_checkpoint(tmp_path) is None
    said = capfd.readouterr().err
    assert "SHA256SUMS cannot be read (no such file or directory)" in said.replace("\n", " ")
    assert "is intact: starting from the beginning" in said.replace("\n", " ")


def test_foreign_files_are_kept(tmp_path, capfd):
    for name in ("step-abc", "step-", "step-1", "step-00000001.bak", "samples"):
        (tmp_path / name).mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, 1)
    (tmp_path / "step-00000001/.DS_Store").write_text("extra")
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert capfd.readouterr().err == ""
    assert len(steps(tmp_path)) == 7


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path, capfd):
    save(tmp_path, 3)
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000008")
    assert latest_checkpoint(tmp_path) is None
    assert "state.json is of step 3" in capfd.readouterr().err.replace("\n", " ")


def test_a_checkpoint_of_a_later_format_is_passed_over_and_kept(tmp_path, capfd, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "FORMAT", 3)
        save(tmp_path, 5)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "state.json has format 3; this version of rlhf reads 2" in capfd.readouterr().err.replace("\n", " ")
    save(tmp_path, 2)
    assert "step-00000005" in steps(tmp_path), "the newer rlhf can still go on from it"


def test_a_damaged_checkpoint_is_removed_after_the_next_one(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step-00000009").mkdir()
    save(tmp_path, 3)
    assert steps(tmp_path) == ["step-00000002", "step-00000003"]


def test_an_unreadable_checkpoint_is_passed_over(tmp_path, capfd, monkeypatch):
    save(tmp_path, 1)
    real = Path.open

    def refuse(path: Path, *arguments, **options):
        if path.name == "tensors.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert latest_checkpoint(tmp_path) is None
    assert "tensors.safetensors cannot be read (permission denied)" in capfd.readouterr().err.replace("\n", " ")


def test_the_best_is_replaced_and_outlives_rotation(tmp_path):
    assert best_checkpoint(tmp_path) is None
    save(tmp_path, 1)
    save_best(tmp_path, 1, tensors(1), {"score": 0.5})
    for step in (2, 3, 4):
        save(tmp_path, step)
    save_best(tmp_path, 3, tensors(3), {"score": 0.7})
    found = best_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (3, {"score": 0.7})
    assert steps(tmp_path) == ["best-00000003", "step-00000003", "step-00000004"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 4


@pytest.mark.parametrize("moment", ["mkdir", "rename", "rmtree"])
def test_a_death_while_the_best_is_replaced_leaves_one_of_them_whole(tmp_path, monkeypatch, moment):
    class Death(BaseException):
        pass

    def die(*arguments, **options):
        raise Death

    save_best(tmp_path, 2, tensors(2), {"score": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(
            *{"mkdir": (Path, "mkdir"), "rename": (Path, "replace"), "rmtree": (shutil, "rmtree")}[moment], die
        )
        with pytest.raises(Death):
            save_best(tmp_path, 6, tensors(6), {"score": 0.6})
    found = best_checkpoint(tmp_path)
    assert found is not None
    assert found.step == (6 if moment == "rmtree" else 2)


def test_a_death_between_the_renames_of_one_step_loses_nothing(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.old")
    (tmp_path / ".step-00000002.partial").mkdir()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 2
    assert steps(tmp_path) == ["step-00000002"]


def test_a_death_before_a_step_written_again_has_its_name_leaves_what_was_there(tmp_path, monkeypatch):
    class Death(BaseException):
        pass

    replace = Path.replace

    def die_at_the_second(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise Death
        return replace(path, target)

    save(tmp_path, 2, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die_at_the_second)
        with pytest.raises(Death):
            save(tmp_path, 2, keep=1)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_value_that_is_not_finite_is_saved(tmp_path, value):
    save(tmp_path, 1)
    bad = tensors(2)
    bad["weight"][1, 2] = value
    with pytest.raises(DivergedError, match=r"checkpoint of step 2 is not saved: 1 of the 15 values of `weight`"):
        save_checkpoint(tmp_path, 2, bad, {})
    assert steps(tmp_path) == ["step-00000001"]


def test_finite_values_whose_sum_is_not_are_saved(tmp_path):
    save_checkpoint(tmp_path, 1, {"weight": torch.full((4,), 3e38), "half": torch.full((9,), 6e4).half()}, {})
    assert latest_checkpoint(tmp_path) is not None


def test_too_little_room_is_known_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(checkpoint_files, "fsync", lambda *_: pytest.fail("wrote"))
    with pytest.raises(DiskError, match=r"it needs 5,048,\d\d\d bytes, and the disk of .* has 2,000,000 free"):
        save_checkpoint(tmp_path, 2, {"weight": torch.zeros(1_000_000)}, {})
    assert steps(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_a_disk_that_fills_up_on_the_way_leaves_the_one_before_and_no_half(tmp_path, monkeypatch, number):
    save(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(number, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(DiskError, match=r"of step 2 in .*: no space left on device; it needs 1\d\d bytes"):
            save(tmp_path, 2)
    assert steps(tmp_path) == ["step-00000001"]
    assert latest_checkpoint(tmp_path) is not None
    save(tmp_path, 2)


def test_the_folder_is_the_same_bytes_every_time(tmp_path):
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, 1, tensors(1), {"z": 1, "a": [0.1, None]})
    for file in FILES:
        first, second = ((tmp_path / name / "step-00000001" / file).read_bytes() for name in "ab")
        assert first == second
    assert json.loads((tmp_path / "a/step-00000001/state.json").read_text())["format"] == 2


class Rank:
    """One of two processes; what the other said is given."""

    count = 2

    def __init__(self, index: int, others: list[object]) -> None:
        self.index, self.is_main, self._others, self.said = index, index == 0, list(others), []

    def all_gather_object(self, item):
        self.said.append(item)
        other = self._others.pop(0)
        return [item, other] if self.is_main else [other, item]


def test_only_the_first_process_writes(tmp_path):
    save(tmp_path, 1, processes=Rank(1, [None]))
    assert steps(tmp_path) == []
    save(tmp_path, 1, processes=Rank(0, [None]))
    assert steps(tmp_path) == ["step-00000001"]


def test_a_failed_write_is_raised_in_every_process(tmp_path):
    main = Rank(0, [None])
    with pytest.raises(DivergedError):
        save_checkpoint(tmp_path, 1, {"weight": torch.tensor(float("nan"))}, {}, processes=main)
    with pytest.raises(DivergedError, match="is not saved"):
        save(tmp_path, 1, processes=Rank(1, main.said))
    with pytest.raises(DiskError, match="full"):
        save(tmp_path, 1, processes=Rank(1, [[0, "full", None]]))


def test_all_processes_read_the_one_that_the_first_chose(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    other = Rank(1, [1, None])
    found = latest_checkpoint(tmp_path, processes=other)
    assert found is not None
    assert found.step == 1
    main = Rank(0, [None, None])
    found = latest_checkpoint(tmp_path, processes=main)
    assert found is not None
    assert (found.step, main.said[0]) == (2, 2)
    assert latest_checkpoint(tmp_path, processes=Rank(1, [None, None])) is None


def test_a_process_that_cannot_read_it_ends_them_all(tmp_path):
    save(tmp_path, 1)
    other = Rank(1, [7, None])
    with pytest.raises(UsageError, match="process 1 cannot read the checkpoint of step 7"):
        latest_checkpoint(tmp_path, processes=other)
    with pytest.raises(UsageError, match="process 1"):
        latest_checkpoint(tmp_path, processes=Rank(0, [None, other.said[1]]))
