"""One small run, whole and halfway, for all tests of faults to copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import SmallRun


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where model and prompts are."""
    return tmp_path_factory.mktemp("faults") / "parts"


@pytest.fixture(scope="session")
def whole(parts: Path) -> SmallRun:
    """A run that nothing disturbed."""
    run = SmallRun.new(parts.with_name("whole"), parts)
    end = run.run_here()
    assert end.code == 0, end.stderr
    return run


@pytest.fixture(scope="session")
def halfway(parts: Path) -> SmallRun:
    """A run that was asked to stop in its second step, with the checkpoints of steps 1 and 2."""
    run = SmallRun.new(parts.with_name("halfway"), parts)
    end = run.run_here(FAULT="signal:2")
    assert end.code == 143, end.stderr
    return run


@pytest.fixture(scope="session")
def expected(halfway: SmallRun) -> dict[str, str]:
    """What it has come to once it went on undisturbed to the end of its last step."""
    run = halfway.copy(halfway.folder.with_name("went-on"))
    end = run.run_here(FAULT="signal:4")
    assert end.code == 143, end.stderr
    return run.stopped()


@pytest.fixture
def broken(halfway: SmallRun, tmp_path: Path) -> SmallRun:
    """A copy of the halfway run to break."""
    return halfway.copy(tmp_path / "broken")
