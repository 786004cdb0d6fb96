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


@pytest.mark.parametrize(
    ("error", "after"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.3]"), signal.SIG_IGN),
        (RuntimeError("no processes are concerned"), signal.SIG_DFL),
    ],
)
def test_a_process_that_lost_another_ends_after_it_said_so(error: RuntimeError, after: signal.Handlers):
    """torchrun sends SIGTERM to the other processes as soon as one has ended."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(RuntimeError), SignalStop():
            raise error
        assert signal.getsignal(signal.SIGTERM) == after
    finally:
        signal.signal(signal.SIGTERM, before)
