"""Commands as forks of a server: what they share with it is no stage, and they end as processes do."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import preloaded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are not forked here"),
]
SHOW = """
import os, signal, sys, time
if sys.argv[1] == "modules":
    print(*sorted(name for name in sys.modules if name.startswith("rlhf_cli.")))
elif sys.argv[1] == "state":
    import beside
    print(os.getcwd(), os.environ.get("OURS"), sys.argv[1:], beside.__file__)
    sys.exit(7)
else:
    print("asleep", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def environment() -> Mapping[str, str]:
    """With which a server runs."""
    variables = os.environ | {"CI": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    preloaded.run(["--version"], env=variables)
    return variables


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "show.py"
    path.write_text(SHOW)
    return path


def test_a_server_has_imported_no_stage(environment, script):
    """A stage that forgets an import must fail in a fork as it does for a user."""
    started = preloaded.start(["modules"], program=script, env=environment)
    names = started.communicate()[0].split()
    assert isinstance(started, preloaded.Started)
    assert "rlhf_cli.pipeline.runner" in names
    assert [name for name in names if name.startswith("rlhf_cli.stages.") and name.endswith((".run", "er"))] == []


def test_a_fork_has_the_folder_environment_path_and_exit_code_it_was_given(environment, script, tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "beside.py").touch()
    given = environment | {"OURS": "yes", "PYTHONPATH": str(folder)}
    started = preloaded.start(["state"], program=script, cwd=tmp_path, env=given)
    assert started.communicate() == (f"{tmp_path} yes ['state'] {folder / 'beside.py'}\n", "")
    assert started.returncode == 7


def test_a_module_that_hides_a_package_is_met_by_a_process_of_its_own(environment, script, tmp_path):
    (tmp_path / "torch.py").touch()
    started = preloaded.start(["state"], program=script, env=environment | {"PYTHONPATH": str(tmp_path)})
    assert not isinstance(started, preloaded.Started)
    started.communicate()


def test_a_fork_is_killed_by_a_signal_or_after_its_time(environment, script):
    started = preloaded.start(["sleep"], program=script, env=environment)
    assert started.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(0.1)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    assert preloaded.run(["--version"], env=environment).stdout.startswith("rlhf ")
