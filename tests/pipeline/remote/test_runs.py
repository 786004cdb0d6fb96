"""Runs with a remote copy: machines that die, storage that fails, empty machines that continue."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli import storage
from rlhf_cli.pipeline.remote.copy import RemoteCopy
from rlhf_cli.pipeline.remote.index import INDEX, read_index
from rlhf_cli.storage import Storage
from tests.pipeline.remote.faulty_storage import URL, content, copied, index, keys, stored
from tests.pipeline.toy import Toy

ALL = ["sft", "label", "train-rm", "ppo", "evaluate"]


def test_an_empty_machine_continues_where_the_lost_one_was(toy: Toy):
    first = toy.run("--remote", URL, "--to", "train-rm")
    assert first.code == 0, first.stderr
    before = content(toy.run_dir)
    assert {name.split("/")[0] for name in before} == {"sft", "label", "train-rm"}
    assert {path: stored()[path] for path in before} == before
    assert stored()["log.txt"]
    toy.ran()
    shutil.rmtree(toy.run_dir)
    second = toy.run("--remote", URL)
    assert second.code == 0, second.stderr
    assert toy.ran() == ["ppo nothing", "evaluate nothing"]
    after = content(toy.run_dir)
    assert {path: after[path] for path in before} == before
    assert {path: stored()[path] for path in after} == after
    files = index().files
    assert {path: files[path]["key"] for path in after} == {path: path for path in after}
    assert keys() == {INDEX, *(file["key"] for file in files.values())}, "nothing is left over"


def test_without_remote_the_copy_is_named(toy: Toy):
    toy.run("--remote", URL, "--to", "sft")
    assert f"has a copy in {URL}, which is not updated without `--remote {URL}`" in toy.run("--to", "sft").stderr


def test_a_dry_run_names_the_copy_that_it_does_not_read(toy: Toy):
    assert f"remote copy: {URL}, which a dry run does not read" in toy.run("--remote", URL, "--dry-run").stderr
    assert not keys()
    assert "remote copy" not in toy.run("--dry-run").stderr


@pytest.mark.slow
def test_kill_9_then_an_empty_machine_resumes_from_the_checkpoint(toy: Toy, tmp_path: Path):
    url = f"file://{tmp_path / 'far'}"
    process = toy.start("run", "recipe.yaml", "--remote", url, FAKE_HANG="ppo")
    deadline = time.monotonic() + 60
    while (found := read_index(Storage(url))) is None or ".ppo.work/checkpoint.txt" not in found.files:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {stage: content(toy.run_dir / stage) for stage in ALL[:3]}
    shutil.rmtree(toy.run_dir)
    toy.ran()
    again = toy.run("--remote", url)
    assert again.code == 0, again.stderr
    assert "continuing the run in it" in again.stderr
    assert toy.ran() == ["ppo step 3", "evaluate nothing"]
    assert {stage: content(toy.run_dir / stage) for stage in ALL[:3]} == before


def test_a_copy_that_stays_behind_is_said_at_once_and_at_the_end(toy: Toy, faulty, monkeypatch):
    copied(toy.run_dir)
    begins = RemoteCopy.start

    def start_failing(copy: RemoteCopy, stop: Any = None) -> None:
        faulty.always.append(PermissionError("Access Denied"))
        begins(copy, stop)

    monkeypatch.setattr(RemoteCopy, "start", start_failing)
    done = toy.run("--remote", URL, "--to", "sft")
    assert done.code == 74
    assert (toy.run_dir / "sft").is_dir(), "the run goes on"
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "storage"
    assert error["message"] == f"the remote copy is behind runs/toy: {URL}: access denied: Access Denied"
    assert "run the same command again, which uploads what is missing" in error["hint"]
    monkeypatch.setattr(RemoteCopy, "start", begins)
    faulty.always.clear()
    toy.ran()
    again = toy.run("--remote", URL, "--to", "sft")
    assert again.code == 0, again.stderr
    assert toy.ran() == []
    assert "sft/model.safetensors" in stored()


def test_a_directory_that_has_all_of_the_copy_runs_while_the_storage_does_not_answer(
    toy: Toy, tmp_path: Path, monkeypatch
):
    far, gone = tmp_path / "far", tmp_path / "gone"
    url = f"file://{far}"
    assert toy.run("--remote", url, "--to", "sft").code == 0
    monkeypatch.setattr(storage, "PAUSE", 0.0)
    far.rename(gone)
    far.write_text("a file, in which nothing can be read")
    away = toy.run("--remote", url, "--to", "label")
    assert "the remote copy cannot be read: " in away.stderr
    assert away.code == 74, "at the end the copy is behind"
    assert (toy.run_dir / "label").is_dir()
    far.unlink()
    gone.rename(far)
    back = toy.run("--remote", url, "--to", "label")
    assert back.code == 0, back.stderr
    assert any(name.startswith("label/") for name in index(url).files)
    shutil.rmtree(toy.run_dir)
    far.rename(gone)
    far.write_text("a file, in which nothing can be read")
    assert toy.run("--remote", url, "--to", "label").code == 74
    assert not (toy.run_dir / "sft").exists(), "an empty directory waits for what the copy has"


@pytest.mark.parametrize(
    "url", ["bucket/runs", "https://host/runs", "s3://", "s3://bucket?key=1", "sftp://me:secret@host/runs"]
)
def test_what_is_not_the_url_of_a_folder_is_refused(toy: Toy, url: str):
    refused = toy.run("--remote", url)
    assert refused.code == 2
    assert "expected the URL of a folder that can be written" in refused.stderr
