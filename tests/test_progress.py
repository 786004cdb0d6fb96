"""Progress without a terminal: plain lines on stderr, nothing on stdout."""

from __future__ import annotations

import io
import json
import socket

import pytest
from rich.cells import cell_len
from rich.text import Text

from rlhf_cli import console as console_module
from rlhf_cli import progress, running_tasks
from rlhf_cli.console import Messages, muted, show_under_bar, spinner, working
from rlhf_cli.durations import format_clock, format_duration
from tests.terminals import screen_of


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_at_the_start_and_one_at_the_end(capsys, clock):
    with progress.task("sampling", 10, "answers") as task:
        clock[0] += 2.5
        task.advance(10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "sampling: 10 answers\nsampling: done in 2.5 s\n"


def test_a_line_number_is_no_emoji(capsys):
    progress.say("data.jsonl:100: a line")
    progress.warn("data.jsonl:1234: another")
    assert capsys.readouterr().err == "data.jsonl:100: a line\nwarning: data.jsonl:1234: another\n"


def test_long_work_prints_its_progress(capsys, clock):
    with progress.task("ppo", 100, done=40) as task:
        for _ in range(6):
            clock[0] += 10
            task.advance(5, note="KL 3.2")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ppo: 60 steps"
    assert lines[1] == "ppo: 60 of 100 steps, about 1 min 20 s left, KL 3.2"  # 20 steps in 40 s, 40 to go


def test_of_several_processes_a_task_counts_what_all_do(capsys, clock):
    """16 of 29 are to come, 9 of them here: what this process does counts as 16/9, and never goes above the total."""
    shown = []
    with progress.task("judging", 29, "questions", done=13, share=9) as task:
        for _ in range(9):
            clock[0] += 31
            task.advance()
            shown.append(task.as_json()["done"])
        task.within(0.0, "")
    assert shown == [14, 16, 18, 20, 21, 23, 25, 27, 29]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "judging: 16 questions"
    assert lines[1].startswith("judging: 14 of 29 questions, about ")


def test_a_process_without_a_share_counts_nothing(capsys):
    with progress.task("judging", 1, "questions", share=0) as task:
        task.advance(0)
    assert task.as_json()["done"] == 0


def test_a_line_before_anything_has_ended_guesses_no_time(capsys, clock):
    with progress.task("sampling", 100, "completions") as task:
        clock[0] += 31
        task.advance(0)
    assert capsys.readouterr().err.splitlines()[1] == "sampling: 0 of 100 completions, 31.0 s so far"


def test_a_part_of_the_first_unit_gives_a_guess(capsys, clock):
    with progress.task("ppo", 4) as task:
        clock[0] += 31
        task.within(0.25, "sampling 8/32 tokens", rate="2 tokens/s")
    line = "ppo: 0 of 4 steps, sampling 8/32 tokens \u00b7 2 tokens/s, ~7 min 45 s left"  # 124 s each, 3.75 to go
    assert capsys.readouterr().err.splitlines()[1] == line


def test_units_that_run_again_still_tell_how_long_a_unit_takes(capsys, clock):
    with progress.task("ppo", 10) as task:
        for _ in range(4):
            clock[0] += 6
            task.advance()
        task.back(3)
        clock[0] += 8
        task.advance()
    # Five units in 32 s, eight to go.
    assert capsys.readouterr().err.splitlines()[1] == "ppo: 2 of 10 steps, about 51.2 s left"


def test_the_time_left_counts_down_while_nothing_moves(clock):
    running = progress.Task("ppo", 4, "steps", None, 0, None, saves=True)
    clock[0] += 10
    running.advance()
    assert running.time_text() == "0:30 left"
    clock[0] += 12
    assert running.time_text() == "0:18 left"
    running.within(0.5, "updating", left=65.0)
    clock[0] += 1
    assert running.time_text() == "1:04 left"
    clock[0] += 100
    assert running.time_text() == "0:00 left"


@pytest.mark.parametrize(
    ("ended", "parts", "expected"),
    [
        pytest.param(0, 0, ["0/100", "0:12 so far"], id="nothing to go by"),
        pytest.param(20, 0, ["40/100", "0:18 left"], id="units that ended"),
        pytest.param(0, 10, ["0/100", "~1:48 left", "512 tokens"], id="a part of those that run"),
        pytest.param(20, 20, ["40/100", "0:08 left", "512 tokens"], id="both"),
    ],
)
@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_shows_the_time_so_far_until_it_knows_the_time_left(width, ended, parts, expected, monkeypatch, clock):
    screen = io.StringIO()
    watched = Messages(file=screen, force_terminal=True, width=width, get_time=lambda: clock[0])
    monkeypatch.setattr(progress, "console", watched)
    monkeypatch.setattr(progress, "interactive", lambda: True)
    with progress.task("sampling completions", 100, "completions") as task:
        for _ in range(2):
            clock[0] += 6
            task.advance(ended)
        if parts:
            task.within(parts, "512 tokens")
    last = [line for line in screen.getvalue().replace("\r", "\n").splitlines() if "sampling" in line][-1]
    shown = Text.from_ansi(last).plain
    assert all(part in shown for part in expected), shown
    assert "0.0 completions/s" not in shown
    assert cell_len(shown) <= width


@pytest.mark.parametrize("width", [40, 80, 120])
def test_ctrl_c_leaves_the_bar_on_the_screen_once(width, monkeypatch):
    screen = io.StringIO()
    watched = Messages(file=screen, force_terminal=True, width=width)
    monkeypatch.setattr(progress, "console", watched)
    monkeypatch.setattr(progress, "interactive", lambda: True)
    assert not show_under_bar(lambda: "SIGINT: nothing runs")
    with progress.task("ppo", 100, "steps") as task:
        for _ in range(2):
            task.advance(1, note="a note that is longer than any terminal is wide " * 5)
            task._bar.refresh()
            screen.write("^C")  # the terminal itself echoes it where the cursor is
            assert show_under_bar(lambda: "SIGINT: stopping after step 3 of 100 of ppo; Ctrl-C again stops at once")
            task._bar.refresh()
    watched.print("error: stopped")
    shown = screen_of(screen.getvalue(), width)
    assert sum("/100" in line for line in shown) == 1, shown
    assert not any("^C" in line for line in shown), shown
    assert " ".join(shown).count("SIGINT: stopping after") == 1
    assert shown[-2:] == ["error: stopped", ""]
    screen.truncate(0)
    with progress.task("evaluate", 1):
        pass
    assert "SIGINT" not in screen.getvalue(), "the next bar has nothing to say of it"


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (60, "ppo ━━━━━━━━━━━━ 1/40  32:07 left updating \u00b7 reward 0.09"),
        (80, "ppo ━━━━━━━━━━━━ 1/40  32:07 left updating \u00b7 reward 0.09  kl 0.0"),
        (100, "ppo ━━━━━━━━━━━━ 1/40  32:07 left updating \u00b7 0:08 in step \u00b7 reward 0.09  kl 0.0  len 22"),
        (
            120,
            "ppo ━━━━━━━━━━━━ 1/40  32:07 left updating \u00b7 0:08 in step"
            " \u00b7 reward 0.09  kl 0.0  len 22  clip 0.01",
        ),
        (
            130,
            "ppo ━━━━━━━━━━━━ 1/40  32:07 left updating 1,095/1,460 tokens \u00b7 0:08 in step \u00b7 "
            "reward 0.09  kl 0.0  len 22  clip 0.01",
        ),
        (
            150,
            "ppo ━━━━━━━━━━━━ 1/40  32:07 left updating 1,095/1,460 tokens \u00b7 0:08 in step \u00b7 15 tokens/s"
            " \u00b7 reward 0.09  kl 0.0  len 22  clip 0.01",
        ),
    ],
)
def test_a_bar_leaves_out_what_matters_least_and_cuts_nothing(width, expected, monkeypatch, clock):
    screen = io.StringIO()
    watched = Messages(file=screen, force_terminal=True, width=width, get_time=lambda: clock[0])
    monkeypatch.setattr(progress, "console", watched)
    monkeypatch.setattr(progress, "interactive", lambda: True)
    with progress.task("ppo", 40) as task:
        task.advance(1, note="reward 0.09  kl 0.0  len 22  clip 0.01")
        for moved in (1.0, 2.0):
            task.within(
                0.5, "updating", amount="1,095/1,460 tokens", rate="15 tokens/s",
                unit_left=10.0, left=1929.0, is_guess=False,
            )  # fmt: skip
            clock[0] += moved
        task._bar.refresh()
        assert screen_of(screen.getvalue(), width)[0].replace("╸", "━") == expected


def test_what_is_waited_for_follows_the_bar(monkeypatch, clock):
    """Ctrl-C right after the first step began, when nothing is known; the bar knows more a little later."""
    screen = io.StringIO()
    watched = Messages(file=screen, force_terminal=True, width=100, get_time=lambda: clock[0])
    monkeypatch.setattr(progress, "console", watched)
    monkeypatch.setattr(progress, "interactive", lambda: True)
    shown = []
    with progress.task("ppo", 4) as task:
        assert show_under_bar(lambda: f"stopping after {running_tasks.what_is_saved()}")
        for _ in range(2):
            task._bar.refresh()
            shown.append(screen_of(screen.getvalue(), 100)[1])
            clock[0] += 5
            task.within(0.25, "sampling")
    assert shown == [
        "stopping after step 1 of 4 of ppo, the first of this run; how long it takes is not known yet",
        "stopping after step 1 of 4 of ppo, in very roughly 15.0 s",
    ]


def test_an_error_inside_is_not_called_done(capsys, clock):
    with pytest.raises(ValueError, match="x"), progress.task("ppo", 1):
        raise ValueError("x")
    assert "done" not in capsys.readouterr().err


def test_markup_in_what_users_wrote_is_text(capsys):
    progress.say("a [bold]b[/bold] [/x]")
    progress.warn("c [red]d [/y]")
    assert capsys.readouterr().err == "a [bold]b[/bold] [/x]\nwarning: c [red]d [/y]\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (4800, "1 h 20 min"),
    ],
)
def test_durations_are_formatted_for_people(seconds, words):
    assert format_duration(seconds) == words


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0:00"), (59.6, "1:00"), (725, "12:05"), (4800, "1:20:00")])
def test_bars_show_times_as_clocks_do(seconds, words):
    assert format_clock(seconds) == words


def read(path):
    return json.loads(path.read_text())


def test_a_file_tells_other_processes_how_far_the_running_tasks_are(tmp_path, clock):
    path = tmp_path / ".progress.json"
    with running_tasks.recorded(path):
        assert read(path) | {"time": 0} == {"host": socket.gethostname(), "stage": None, "time": 0, "tasks": []}
        running_tasks.begin_stage("ppo")
        assert read(path)["stage"] == "ppo"
        with progress.task("ppo", 10, done=2) as steps:
            clock[0] += 6
            steps.advance(3, note="KL 3.2")
            (shown,) = read(path)["tasks"]
            assert shown == {
                "label": "ppo", "done": 5, "total": 10, "unit": "steps", "doing": "KL 3.2", "seconds_left": 10.0,
                "is_guess": False,
            }  # fmt: skip
            with progress.task("evaluation", 4, "prompts"):
                assert [one["label"] for one in read(path)["tasks"]] == ["ppo", "evaluation"]
            assert [one["label"] for one in read(path)["tasks"]] == ["ppo"]
        assert read(path)["tasks"] == []
    assert list(tmp_path.iterdir()) == []
    with progress.task("later", 1):
        assert list(tmp_path.iterdir()) == [], "outside of a stage nothing is written"


def test_the_file_is_written_once_per_second_at_most(tmp_path, clock):
    path = tmp_path / ".progress.json"
    with running_tasks.recorded(path), progress.task("sft", 100) as steps:
        for after, expected in ((0.3, 0), (0.3, 0), (0.5, 3), (0.9, 3), (0.2, 5)):
            clock[0] += after
            steps.advance()
            assert read(path)["tasks"][0]["done"] == expected


def test_a_stage_goes_on_where_the_file_cannot_be_written_or_removed(tmp_path):
    folder = tmp_path / "gone"
    with running_tasks.recorded(folder / ".progress.json"), progress.task("sft", 2) as steps:
        steps.advance(2)
    with pytest.raises(ZeroDivisionError), running_tasks.recorded(tmp_path / ".progress.json"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_only_the_main_process_writes_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(running_tasks, "is_main", lambda: False)
    with running_tasks.recorded(tmp_path / ".progress.json"), progress.task("sft", 2):
        assert list(tmp_path.iterdir()) == []


def test_a_request_to_stop_waits_for_the_step_that_is_under_way(clock):
    assert running_tasks.what_is_saved() is None
    with progress.task("tokenizing", 9, "records", saves=False):
        assert running_tasks.what_is_saved() is None
    with progress.task("ppo", 10) as task:
        first = "step 1 of 10 of ppo, the first of this run; how long it takes is not known yet"
        assert running_tasks.what_is_saved() == first
        clock[0] += 5
        task.within(0.25, "sampling")
        assert running_tasks.what_is_saved() == "step 1 of 10 of ppo, in very roughly 15.0 s"
        clock[0] += 15
        task.advance()
        clock[0] += 5
        task.within(0.5, "updating")  # 1.5 steps in 25 s
        with progress.task("held-out completions", 4, "completions"):
            assert running_tasks.what_is_saved() == "step 2 of 10 of ppo, in about 8.3 s"
        clock[0] += 9
        assert running_tasks.what_is_saved() == "step 2 of 10 of ppo, which takes longer than those before it"
    with progress.task("sampling completions", 4, "completions") as task:
        batch = "the current batch of sampling completions"
        assert running_tasks.what_is_saved() == f"{batch}, the first; how long it takes is not known yet"
        clock[0] += 8
        task.advance(2)
        clock[0] += 3
        assert running_tasks.what_is_saved() == f"{batch}, in about 5.0 s"
        task.within(0.5, "40 tokens")
        assert running_tasks.what_is_saved() == "the current token of sampling completions, in about 3.0 s"
        clock[0] += 4
        assert running_tasks.what_is_saved() == "the current token of sampling completions, about to end"


@pytest.fixture
def screen(monkeypatch) -> io.StringIO:
    """What is written to a terminal of 80 columns."""
    written = io.StringIO()
    watched = Messages(file=written, force_terminal=True, width=80)
    for module in (progress, console_module):
        monkeypatch.setattr(module, "console", watched)
        monkeypatch.setattr(module, "interactive", lambda: True)
    return written


def test_work_without_a_bar_is_shown_and_leaves_nothing(screen):
    with working("loading a model ..."):
        progress.say("a message")
    assert "loading a model ..." in screen.getvalue()
    assert [line for line in screen_of(screen.getvalue(), 80) if line] == ["a message"]


def test_work_within_something_shown_is_not_shown(screen):
    with spinner("reading ..."), working("hidden within a spinner"):
        pass
    with progress.task("ppo", 3), working("hidden within a bar"):
        pass
    with working("reading ..."), working("hidden within another"):
        pass
    assert "hidden" not in screen.getvalue()
    with working("shown again"):
        pass
    assert "shown again" in screen.getvalue()


def test_work_is_not_shown_without_a_terminal(capsys):
    with working("loading ..."):
        pass
    assert capsys.readouterr().err == ""


def test_muted_messages_are_not_shown_and_a_spinner_is(screen):
    with spinner("measuring ..."), muted():
        progress.say("hidden")
        progress.warn("hidden too")
    progress.say("shown")
    assert "measuring ..." in screen.getvalue()
    assert [line for line in screen_of(screen.getvalue(), 80) if line] == ["shown"]
