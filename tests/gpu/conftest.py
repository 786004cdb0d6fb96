"""Fixtures of the tests on fake GPUs: one host per pytest process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gpu.running import Host, fake_gpus


@pytest.fixture(scope="session")
def gpu() -> Iterator[Host]:
    """A host with one fake GPU."""
    with fake_gpus() as host:
        yield host
