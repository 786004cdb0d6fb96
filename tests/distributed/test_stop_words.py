"""What a user reads after a request to stop fits the signal."""

from __future__ import annotations

import signal

import pytest

from rlhf_cli.distributed.signals import SignalStop


@pytest.mark.parametrize(
    ("signum", "text"),
    [
        (signal.SIGINT, "SIGINT: stopping after step 3; Ctrl-C again stops at once"),
        (signal.SIGTERM, "SIGTERM: stopping after step 3; SIGINT (Ctrl-C) stops at once"),
        (signal.SIGUSR1, "SIGUSR1: stopping after step 3; SIGINT (Ctrl-C) stops at once"),
    ],
)
def test_the_way_to_stop_at_once_fits_the_signal(signum: signal.Signals, text: str, capfd):
    with SignalStop(lambda: "step 3"):
        signal.raise_signal(signum)
    assert text in capfd.readouterr().err.splitlines()
