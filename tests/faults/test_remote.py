"""kill -9 in the middle of an upload: an empty machine resumes from the copy, and ends with the same bytes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from rlhf_cli.pipeline.remote import copy as remote_module
from rlhf_cli.pipeline.remote.index import Index, read_index
from rlhf_cli.storage import Storage
from tests.faults.harness import SmallRun

PLACES: dict[str, Callable[[str, int], bool]] = {
    "the index": lambda path, number: path.endswith("rlhf-remote.json") and number > 12,
    "the tensors of a checkpoint": lambda path, number: "step-00000002/tensors" in path,
    "the checksums of a checkpoint": lambda path, number: "step-00000003/SHA256SUMS" in path,
    "the finished artifact": lambda path, number: "/toy/ppo/" in path and path.endswith("safetensors"),
}


def killing(is_there: Callable[[str, int], bool]) -> Callable[..., None]:
    """A way to write that ends its process after half of a file."""
    whole, names = LocalFileSystem.pipe_file, []

    def write(self: LocalFileSystem, path: str, content: bytes, **rest: Any) -> None:
        names.append(path)
        if is_there(path, len(names)):
            whole(self, path, content[: len(content) // 2], **rest)
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, path, content, **rest)

    return write


def index_of(url: str) -> Index:
    found = read_index(Storage(url))
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_killed_in_an_upload_an_empty_machine_ends_with_the_same_bytes(
    whole, parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    url = f"file://{tmp_path}/far/toy"
    lost = SmallRun.new(tmp_path / "lost", parts, None, "--remote", url)
    with monkeypatch.context() as patched:
        patched.setattr(LocalFileSystem, "pipe_file", killing(PLACES[place]))
        patched.setattr(remote_module, "POLL", 0.02)
        process = lost.fork()
    end = lost.finish(process)
    assert end.code == -9, end.stderr
    checkpoints = [path for path in index_of(url).files if path.endswith("/SHA256SUMS")]
    assert all((tmp_path / "far/toy" / file["key"]).is_file() for file in index_of(url).files.values())
    run = SmallRun.new(tmp_path / "empty", parts, None, "--remote", url)
    end = run.run_here()
    assert end.code == 0, end.stderr
    assert ("ppo: resuming (it has not finished)" in end.stderr) == bool(checkpoints)
    assert checkpoints or place != "the finished artifact"
    finished = {name: digest for name, digest in whole.digests().items() if name.startswith("ppo/")}
    assert {name: digest for name, digest in run.digests().items() if name.startswith("ppo/")} == finished
    for path, file in index_of(url).files.items():
        if path.startswith("ppo/"):
            assert (tmp_path / "far/toy" / file["key"]).read_bytes() == (run.run_dir / path).read_bytes()
