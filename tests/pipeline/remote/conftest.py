"""Storage that fails when it is told to, and no long pauses."""

from __future__ import annotations

import fsspec
import pytest

from rlhf_cli import storage
from rlhf_cli.pipeline.remote import copy as remote_module
from tests.pipeline.remote.faulty_storage import FaultyFileSystem


@pytest.fixture(autouse=True)
def faulty(monkeypatch: pytest.MonkeyPatch) -> type[FaultyFileSystem]:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    for kept in (FaultyFileSystem.store, FaultyFileSystem.written, FaultyFileSystem.failing, FaultyFileSystem.always):
        kept.clear()
    monkeypatch.setattr(storage, "PAUSE", 0.01)
    monkeypatch.setattr(remote_module, "POLL", 0.02)
    return FaultyFileSystem
