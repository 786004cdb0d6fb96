"""Shown completions: what the file holds, and that nothing but text reaches the terminal."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from rlhf_cli.data.records import Message
from rlhf_cli.training.monitoring import samples
from rlhf_cli.training.monitoring.samples import SampleLog, ShownCompletion, warn_of_ratio
from rlhf_cli.training.monitoring.step_lines import read_rows

COMPLETION = ShownCompletion("What is the capital of France?", "Paris.", score=1.25, kl=3.21, tokens=4, ended=True)
EVIL = ShownCompletion(
    "Is [bold]this[/bold] a\x1b[2J prompt?\nYes.",
    "a \x1b[31mred\x1b[0m \x9b5m[link=x]word[/link]\rb",
    0.0,
    0.0,
    1,
    False,
)


def printed(rows: list[ShownCompletion], width: int = 80) -> list[str]:
    console = Console(width=width, record=True, force_terminal=True, file=io.StringIO())
    console.print(samples.view(1_200, rows))
    return console.export_text().splitlines()


def test_completions_are_kept_as_lines_and_printed(tmp_path, capsys):
    log = SampleLog(tmp_path / "samples.jsonl")
    log.show(10, [COMPLETION, EVIL])
    log.close()
    first, second = read_rows(tmp_path / "samples.jsonl")
    assert first == {
        "step": 10, "prompt": COMPLETION.prompt, "completion": "Paris.", "score": 1.25, "kl": 3.21, "tokens": 4,
        "ended": True,
    }  # fmt: skip
    assert second["completion"] == EVIL.completion  # the file holds the raw text; only the terminal gets it stripped
    said = capsys.readouterr()
    assert "completions after step 10" in said.err
    assert said.out == ""


def test_later_steps_are_dropped_when_a_run_goes_on(tmp_path, capsys):
    path = tmp_path / "samples.jsonl"
    for after_step, steps in ((0, (0, 10, 20)), (10, (20, 30))):
        log = SampleLog(path, after_step=after_step)
        for step in steps:
            log.show(step, [COMPLETION, COMPLETION])
        log.close()
    assert [row["step"] for row in read_rows(path)] == [0, 0, 10, 10, 20, 20, 30, 30]
    assert "warning" not in capsys.readouterr().err


def test_a_damaged_file_is_named_and_what_can_be_read_stays(tmp_path, capsys):
    path = tmp_path / "samples.jsonl"
    log = SampleLog(path)
    log.show(1, [COMPLETION])
    log.show(2, [COMPLETION, COMPLETION])
    log.close()
    path.write_bytes(path.read_bytes().replace(b"Paris", b"P\xffris", 1))
    SampleLog(path, after_step=2).close()
    assert [row["step"] for row in read_rows(path)] == [2, 2]
    assert str(path) in capsys.readouterr().err


def test_a_run_that_never_showed_completions_may_begin_to(tmp_path, capsys):
    SampleLog(tmp_path / "samples.jsonl", after_step=50).close()
    assert capsys.readouterr().err == ""


def test_a_score_that_is_not_finite_is_null_in_the_file(tmp_path):
    log = SampleLog(tmp_path / "samples.jsonl")
    log.show(1, [ShownCompletion("p", "a", math.nan, math.inf, 1, False)])
    log.close()
    row = json.loads((tmp_path / "samples.jsonl").read_text())
    assert (row["score"], row["kl"]) == (None, None)


def test_the_view_is_compact_and_names_the_figures():
    assert [line.rstrip() for line in printed([COMPLETION, EVIL])] == [
        "completions after step 1,200",
        "",
        "  What is the capital of France?",
        "    Paris.",
        "    reward +1.25, KL 3.2 nats, 4 tokens",
        "",
        "  Is [bold]this[/bold] a prompt? Yes.",
        "    a red 5m[link=x]word[/link]b",
        "    reward +0.00, KL 0.0 nats, 1 token, did not finish",
        "",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_long_completions_wrap_and_many_lines_are_cut(width):
    long = ShownCompletion(
        "why? " * 60, "so it is. " * 50 + "\n\n\n" + "\n".join("list" for _ in range(30)), 0, 0, 9, True
    )
    lines = printed([long], width)
    assert max(len(line) for line in lines) <= width
    assert sum("why?" in line for line in lines) == 1  # a prompt takes one line
    assert sum("list" in line for line in lines) == 11
    assert any(line.strip() == "... 19 more lines" for line in lines)
    assert not any(line.strip() == "" for line in lines[2:-1])


def test_an_empty_completion_is_named():
    lines = printed([ShownCompletion("", " \n", 0.0, 0.0, 1, True)])
    assert [line.strip() for line in lines][2:4] == ["(an empty prompt)", "(an empty completion)"]


def test_skipped_optimizer_steps_name_their_completion_and_token(capsys):
    prompt = (Message("system", "be [red]kind[/red]"), Message("user", "how \x1b[31mare\x1b[0m you?"))
    warn_of_ratio(step=1_012, skipped=2, limit=10.0, prompt=prompt, completion="fine " * 100, token=" fine")
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("warning: step 1,012: 2 optimizer steps were skipped, because the mean probability ratio")
    assert '`ppo.ratio_limit: 10`; it is largest at "fine" in "fine fine' in said
    assert 'fine...", the completion of "system: be [red]kind[/red] user: how are you?"' in said
    assert len(said) < 500


def test_a_token_of_white_space_can_be_named(capsys):
    warn_of_ratio(step=1, skipped=1, limit=1.5, prompt="p", completion="a", token="\n")
    said = " ".join(capsys.readouterr().err.split())
    assert "1 optimizer step was skipped" in said
    assert r'"\n" in "a"' in said
