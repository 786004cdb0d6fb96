"""The end of the installed command: exit functions run, Python's teardown does not once torch is loaded."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import types

import pytest

from rlhf_cli import cli


class EndedError(Exception):
    """The process would have ended here."""


@pytest.fixture
def calls(monkeypatch):
    """What `entry` does at the end, with a command that fails with code 7."""
    found: list[str] = []

    def end(code: int) -> None:
        found.append(f"ended with {code}")
        raise EndedError

    monkeypatch.setattr(cli, "main", lambda: 7)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: found.append("exit functions"))
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.main_thread(), threading.Thread(daemon=True)])
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    return found


def test_once_torch_is_loaded_the_process_ends_without_teardown(calls):
    with pytest.raises(EndedError):
        cli.entry()
    assert calls == ["exit functions", "ended with 7"]


def test_without_torch_and_with_threads_that_work_it_ends_as_usual(calls, monkeypatch):
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.Thread()])
    with pytest.raises(SystemExit, match="7"):
        cli.entry()
    monkeypatch.setattr(threading, "enumerate", list)
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(SystemExit, match="7"):
        cli.entry()
    assert calls == []
