"""Gives every Python process that is started with this folder on PYTHONPATH two fake GPUs: `RLHF_FAKE_GPU=LIBRARY`."""

import os
from pathlib import Path

if "RLHF_FAKE_GPU" in os.environ:
    from tests.gpu import guard

    loaded = guard.load(Path(os.environ["RLHF_FAKE_GPU"]))
    from tests.gpu import library

    library.install(loaded, devices=2)
    from tests.gpu import kernels

    kernels.install()
