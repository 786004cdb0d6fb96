"""CPU threads of a run."""

import os
import subprocess
import sys


def test_threads_are_limited_before_the_libraries_are_imported(monkeypatch):
    from rlhf_cli.pipeline.runner import limit_threads

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "7")
    limit_threads(None)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    limit_threads(1)
    code = "import torch; print(torch.get_num_threads())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "1"
