"""The picture in the terminal: it fits, and shows curves, findings and completions."""

from __future__ import annotations

import io
import sys
import threading

import pytest
from rich.console import Console

from rlhf_cli.cli.watch import watch as watch_command
from rlhf_cli.watch import terminal
from rlhf_cli.watch.state import read_live


def shown(run, width: int, height: int | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(terminal.picture(read_live(run.folder), width, height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("height", [10, 16, 24, 30, 40, 80, None])
def test_it_fits_the_terminal(ppo_run, width, height):
    ppo_run.progress()
    ppo_run.steps(30, **{"val/explained_variance": -1.0})
    lines = shown(ppo_run, width, height)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    assert height is None or len(lines) <= height
    assert "30 of 60 steps, 1:05 left" in text
    has_chart = any("\u2800" <= mark <= "\u28ff" for mark in text)
    assert has_chart == (height is None or height >= 16), "braille"
    assert ("Reward (mean of completions): " in text) == has_chart
    assert ("health: " in text) == (height != 10 or not has_chart)
    assert height is not None or "Critic (explained variance): " in text, "without a limit all curves are shown"
    assert height not in (40, 80, None) or "step 30: Let it rise 30 hours." in text
    assert not set("\x1b\u202e") & set(text)


def test_the_view_says_how_to_leave_it(ppo_run, monkeypatch):
    ppo_run.progress()
    drawn: list[list[str]] = []

    def update(live, picture, **_):
        console = Console(file=io.StringIO(), width=80, color_system=None)
        console.print(picture)
        drawn.append(console.file.getvalue().splitlines())
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal.Live, "update", update)
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    with pytest.raises(KeyboardInterrupt):
        terminal.watch(ppo_run.folder, console)
    (lines,) = drawn
    assert lines[-1] == "Ctrl-C ends watching, not the run"
    assert len(lines) <= 24


def test_two_charts_stand_side_by_side_where_there_is_room(ppo_run):
    def heads(width: int) -> int:
        return sum("Reward (mean" in line and "KL (nats" in line for line in shown(ppo_run, width))

    assert (heads(120), heads(80)) == (1, 0)


def test_a_curve_that_does_not_change_does_not_fill_the_chart(ppo_run):
    lines = shown(ppo_run, 80)
    start = next(number for number, line in enumerate(lines) if line.startswith("Length (tokens): 30 → 30"))
    drawn = [line for line in lines[start + 2 : start + 11] if any("\u2801" <= mark <= "\u28ff" for mark in line)]
    assert len(drawn) == 1


def test_a_short_run_shows_where_it_began_and_where_it_is(ppo_run):
    ppo_run.steps(2)
    assert "Reward (mean of completions): 1 → 1.69" in "\n".join(shown(ppo_run, 80))


def test_a_single_step_has_a_value_and_no_chart(ppo_run):
    ppo_run.steps(1)
    text = "\n".join(shown(ppo_run, 80))
    assert "Reward (mean of completions): 1 → 1" in text
    assert "┌" not in text


def test_findings_are_shown_and_the_rest_is_counted(ppo_run):
    bad = {
        "policy/clipfrac_avg": 0.6,
        "val/explained_variance": -1.0,
        "policy/approxkl_avg": 1.0,
        "objective/kl": 900.0,
    }
    ppo_run.steps(30, **bad)
    found = [line for line in shown(ppo_run, 300) if line.startswith("health: ")]
    assert 1 < len(found) <= 4
    assert len(read_live(ppo_run.folder).findings) <= 3 or "see `rlhf diagnose" in found[-1]


def test_it_is_watched_until_the_run_ends(ppo_run, monkeypatch):
    monkeypatch.setattr(terminal, "EVERY", 0.05)
    console = Console(file=io.StringIO(), width=80, height=40, force_terminal=True)
    ended = threading.Event()
    ppo_run.progress()

    def watch() -> None:
        terminal.watch(ppo_run.folder, console)
        ended.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert not ended.wait(0.5)
    (ppo_run.folder / ".progress.json").unlink()
    assert ended.wait(20)
    watcher.join()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().rindex("ppo killed") > console.file.getvalue().rindex("ppo running")


def test_ctrl_c_is_the_way_to_leave_and_no_error(tmp_path, monkeypatch, capsys):
    def leave(folder, console):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_cli.watch.terminal.watch", leave)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    watch_command(tmp_path)
    assert capsys.readouterr().err == ""
