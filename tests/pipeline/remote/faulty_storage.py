"""Storage in memory that fails when it is told to, and copies of run directories in it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

from fsspec.implementations.memory import MemoryFileSystem

from rlhf_cli.pipeline.remote.attach import remote_copy
from rlhf_cli.pipeline.remote.index import INDEX, read_index
from rlhf_cli.pipeline.remote.snapshot import scan
from rlhf_cli.storage import Storage

URL = "faulty://bucket/runs/toy"


class FaultyFileSystem(MemoryFileSystem):
    """Keeps files in memory, writes down what is written, and fails when it is told to."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    written: ClassVar[list[str]] = []
    failing: ClassVar[dict[int, Exception]] = {}
    """Number of a write, from 0 -> what it raises, after half of its bytes are there."""
    always: ClassVar[list[Exception]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.removeprefix("faulty://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        number = len(self.written)
        path = self._strip_protocol(path)
        self.written.append(path.removeprefix("/bucket/runs/toy/"))
        error = self.failing.get(number) or next(iter(self.always), None)
        if error is not None and not path.endswith(INDEX):
            super().pipe_file(path, value[: len(value) // 2], mode, **kwargs)
        if error is not None:
            raise error
        super().pipe_file(path, value, mode, **kwargs)


def content(folder: Path) -> dict[str, bytes]:
    """All that counts in a run directory, by path; not what is different at each start."""
    seen = scan(folder)
    assert seen is not None
    passing = ("log.txt", "command.txt", "environment.json", "recipe.yaml", "README.md")
    return {
        path: (folder / path).read_bytes() for path in seen if Path(path).name not in passing and "recipes/" not in path
    }


def index(url: str = URL):
    found = read_index(Storage(url))
    assert found is not None
    return found


def stored(url: str = URL) -> dict[str, bytes]:
    """What the index lists, by path."""
    return {path: Storage(url).read(file["key"]) or b"" for path, file in index(url).files.items()}


def keys() -> set[str]:
    """Names of all files behind the URL."""
    return {path.removeprefix("/bucket/runs/toy/") for path in FaultyFileSystem.store}


def folder_with(path: Path, **files: str) -> Path:
    for name, text in files.items():
        target = path / name.replace("__", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return path


def copied(folder: Path, url: str = URL, name: str = "toy") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with remote_copy(url, folder, name):
        pass


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
