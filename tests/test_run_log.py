"""The log of a run: every message with its time, in plain text, whatever the terminal shows."""

from __future__ import annotations

import io
import os
import re
import signal
import sys

import pytest

from rlhf_cli import progress, run_log, verbosity
from rlhf_cli.console import console

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ  ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def log(tmp_path):
    yield tmp_path / "log.txt"
    run_log.close()
    verbosity.set_verbosity(verbosity.Verbosity.NORMAL)


def lines_of(path) -> list[str]:
    lines = path.read_text().splitlines()
    assert all(TIME.match(line) for line in lines), lines
    return [TIME.sub("", line) for line in lines]


def test_messages_and_what_code_of_others_prints_are_logged(log, capsys):
    with run_log.logged(log, "$ rlhf run"):
        progress.say("sft: starting")
        progress.warn("loss [is] high")
        print("a reward function says", "this", file=sys.stderr)
        print("and ends a line ", end="later\n", file=sys.stderr)
        sys.stderr.write("\r 10 %\r 100 %\n")
        sys.stderr.write("half a li")
    assert lines_of(log) == [
        "$ rlhf run", "sft: starting", "warning: loss [is] high", "a reward function says this",
        "and ends a line later", " 100 %", "half a li",
    ]  # fmt: skip
    assert "half a li" in capsys.readouterr().err, "stderr itself waits for no line"


def test_a_resumed_run_appends_and_nothing_is_logged_afterwards(log, capsys):
    for attempt in ("first", "second"):
        with run_log.logged(log, f"$ {attempt}"):
            progress.say("works")
        progress.say("something else")
        print("something else", file=sys.stderr)
    assert lines_of(log) == ["$ first", "works", "$ second", "works"]


def test_a_bar_of_another_library_keeps_its_last_picture_alone(log, capsys):
    with run_log.logged(log, "$"):
        for share in range(100):
            sys.stderr.write(f"\r {share} %")
            assert len(sys.stderr._begun) <= 6
        sys.stderr.write("\r 100 %\r")
        sys.stderr.write("\n")
        progress.say("data.jsonl:100: read")
    assert lines_of(log) == ["$", " 100 %", "data.jsonl:100: read"]


def test_the_message_of_an_error_is_logged_until_the_log_is_closed(log):
    with pytest.raises(KeyError), run_log.logged(log, "$ rlhf"):
        raise KeyError
    print("error: it failed", file=sys.stderr)
    run_log.close()
    print("of another command", file=sys.stderr)
    assert lines_of(log) == ["$ rlhf", "error: it failed"]


def test_quiet_hides_messages_but_logs_them(log, capsys):
    verbosity.set_verbosity(verbosity.Verbosity.QUIET)
    with run_log.logged(log, "$"), progress.task("ppo", 3) as task:
        progress.say("a message")
        progress.say("http://127.0.0.1:8100", always=True)
        task.advance(3)
    assert capsys.readouterr().err == "http://127.0.0.1:8100\n"
    assert lines_of(log) == ["$", "ppo: 3 steps", "a message", "http://127.0.0.1:8100", "ppo: done in 0.0 s"]


def test_details_are_logged_once_and_printed_under_verbose(log, capsys):
    with run_log.logged(log, "$"):
        progress.detail("attention: `torch`, first")
        progress.detail("attention: `torch`, first")
        verbosity.set_verbosity(verbosity.Verbosity.VERBOSE)
        progress.detail("attention: `torch`, second")
    assert capsys.readouterr().err == "attention: `torch`, second\n"
    assert lines_of(log) == ["$", "attention: `torch`, first", "attention: `torch`, second"]


def test_on_a_terminal_the_log_has_lines_in_place_of_the_bar(log, monkeypatch):
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with run_log.logged(log, "$"), progress.task("sampling", 2, "completions") as task:
        task.advance()
        progress.warn("above the bar")
        print("a library above the bar", file=sys.stderr)
        task.advance()
    run_log.close()
    assert sys.stderr is screen
    assert "\x1b[" in screen.getvalue()
    found = lines_of(log)
    assert found[:-1] == ["$", "sampling: 2 completions", "warning: above the bar", "a library above the bar"]
    assert found[-1].startswith("sampling: done in ")


def test_a_table_is_logged_as_it_looks_and_escapes_of_others_are_not(log, capsys):
    from rich.table import Table

    table = Table("stage", "time", box=None, pad_edge=False)
    table.add_row("[red]sft[/red]", "3 s")
    with run_log.logged(log, "$"):
        console.print(table, soft_wrap=False)
        progress.say("\x1b[31mred\x07")
    assert lines_of(log) == ["$", "stage  time", "sft    3 s", "red"]


def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path, capsys):
    with run_log.logged(tmp_path / "no" / "log.txt", "$"):
        progress.say("works")
    assert capsys.readouterr().err == "works\n"


def test_a_signal_handler_may_write(log):
    before = signal.signal(signal.SIGUSR1, lambda *_: run_log.write("SIGUSR1: stopping\n"))
    try:
        with run_log.logged(log, "$"):
            os.kill(os.getpid(), signal.SIGUSR1)
            print("whole", file=sys.stderr)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert lines_of(log) == ["$", "SIGUSR1: stopping", "whole"]
