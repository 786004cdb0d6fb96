"""Disk space: the check before a run, and errors of a full disk."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from rlhf_cli.errors import DiskError
from rlhf_cli.pipeline.disk_space import check_free_space, disk_errors, format_bytes, model_bytes, needed_bytes
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.registry import stage


def recipe(tmp_path: Path, **sections: dict) -> Recipe:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "unrelated.bin").write_bytes(b"x" * 5000)
    sft = {"sft": {"data": "d"} | sections.pop("sft", {})}
    return Recipe.model_validate({"model": {"path": str(tmp_path)}, "evaluate": {}} | sft | sections)


def test_needed_bytes_by_hand(tmp_path):
    margin, full = 64 << 20, 2 * 1000
    both = recipe(tmp_path, ppo={})
    assert needed_bytes(both, [stage("sft"), stage("ppo"), stage("evaluate")]) == margin + full + full
    # One model written, three times its size in two checkpoints and the one being written.
    alone = recipe(tmp_path, sft={"adapter": "none"})
    assert needed_bytes(alone, [stage("sft")]) == margin + full * (1 + 3 * 3)
    assert needed_bytes(alone, [stage("evaluate")]) == margin


def test_needed_bytes_of_ppo_include_the_critic_and_kept_checkpoints(tmp_path):
    margin, full = 64 << 20, 2 * 1000
    two = recipe(tmp_path, ppo={"adapter": "none", "keep_checkpoints": 3})
    assert needed_bytes(two, [stage("ppo")]) == margin + full * (2 + 2 * 3 * 4)
    critic = {"critic": "separate", "keep_checkpoints": 1, "eval_steps": 5, "kl_budget": 4.0}
    assert needed_bytes(recipe(tmp_path, ppo=critic), [stage("ppo")]) == margin + full * (2 + 3 * 2 + 1)


def test_models_that_are_not_local_count_as_zero():
    assert model_bytes("owner/name") == 0
    assert model_bytes(None) == 0


def test_too_little_space_reports_free_and_needed(tmp_path):
    with pytest.raises(DiskError, match=r"not enough disk space in .*: .* free, about 1000000.0 TB needed") as caught:
        check_free_space(tmp_path, 10**18)
    assert caught.value.exit_code == 74
    check_free_space(tmp_path, 1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_disk_errors_are_distinguished(tmp_path, number):
    with pytest.raises(DiskError), disk_errors(tmp_path):
        raise OSError(number, "whatever")


def save_badly() -> None:
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        raise ValueError("could not save") from error


def test_a_full_disk_behind_another_error_is_found(tmp_path):
    with pytest.raises(DiskError, match="no space left on device"), disk_errors(tmp_path):
        save_badly()


def save_well() -> None:
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        raise DiskError("it needs 12 bytes") from error


def test_a_specific_disk_error_is_kept(tmp_path):
    with pytest.raises(DiskError, match="it needs 12 bytes"), disk_errors(tmp_path):
        save_well()


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "no such file")


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e12, "3.0 TB")]
)
def test_bytes_are_formatted_with_a_unit(count, words):
    assert format_bytes(count) == words
