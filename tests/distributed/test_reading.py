"""What `UnreadModel.read` does besides dividing weights: it merges an adapter, and returns the memory that it freed."""

from __future__ import annotations

import json
import signal
import sys

import pytest

from tests.distributed.reading import PIECE, PIECES
from tests.distributed.sharded_models import make_model
from tests.distributed.test_sharding import started_by_rank


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What `reading.py` wrote."""
    folder = tmp_path_factory.mktemp("reading")
    make_model("llama", folder / "llama")
    started = started_by_rank("reading.py", [folder], 2)
    try:
        for process in started:
            stdout, stderr = process.communicate(timeout=300)
            assert process.returncode == 0, stdout + stderr
    finally:
        for process in started:
            if process.poll() is None:  # it waits for one that has failed
                process.send_signal(signal.SIGKILL)
    return json.loads((folder / "reading.json").read_text())


def test_an_adapter_is_merged_as_in_one_process(found: dict[str, float]):
    assert found["difference"] < 1e-6
    assert found["moved"] > 1e-2, "the adapter would change nothing"


def test_an_adapter_that_is_not_merged_stays(found: dict[str, float]):
    assert found["adapted"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc returns memory when it is asked to")
def test_memory_that_reading_freed_is_returned(found: dict[str, float]):
    """It takes 66 MB in pieces that glibc would keep; the model is far smaller."""
    assert found["kept"] < PIECES * PIECE / 3
