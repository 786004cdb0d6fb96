"""The questions of `rlhf start`: in this process with replies from a list, and in a pseudo-terminal."""

from __future__ import annotations

import signal
import time

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.start.questions import Given, Questions
from tests.start.conftest import QUESTIONS
from tests.terminals import Terminal, screen_of


@pytest.fixture
def answer(capsys, monkeypatch, tmp_path):
    """Answers the questions; returns the plan and what was shown."""
    monkeypatch.chdir(tmp_path)

    def run(*replies, **given):
        left = list(replies)

        def read(_: str) -> str:
            if not left:
                raise EOFError
            return str(left.pop(0))

        plan = Questions(Given(**given), read).draft()
        assert not left
        return plan, " ".join(capsys.readouterr().err.split())

    return run


def test_four_questions_and_their_defaults(answer, tiny_llama, questions):
    plan, shown = answer(tiny_llama, questions, "", "")
    assert (plan.labels.source, plan.steps) == ("people", 10)
    assert [number in shown for number in ("1. Which model", "2. Which prompts", "3. Who says", "4. How many")] == [
        True
    ] * 4
    assert "30 prompts of" in shown


def test_options_answer_questions_beforehand(answer, tiny_llama, questions):
    plan, shown = answer("", model=str(tiny_llama), prompts=str(questions), steps=7)
    assert plan.steps == 7
    assert "1. Who says" in shown
    assert "2." not in shown.partition("1. Who says")[2].replace("2  I have", "")


def test_a_bad_reply_is_explained_and_asked_again(answer, tiny_llama, questions):
    replies = ["absent/", "", tiny_llama, "nothing.txt", questions, "7", "1", "x", "0", "12"]
    plan, shown = answer(*replies)
    assert plan.steps == 12
    for said in (
        "absent/: no such model folder",
        "an answer is needed",
        "nothing.txt: no such file",
        "`7` is not one of the numbers 1 to 4",
        "`x` is not a number of steps",
        "`0` is not a number of steps",
    ):
        assert said in shown


def test_a_setting_that_reads_the_file_is_offered(answer, tiny_llama, tmp_path):
    path = tmp_path / "asked.csv"
    path.write_text("query,topic\n" + "".join(f"{question},x\n" for question in QUESTIONS))
    plan, shown = answer(tiny_llama, "asked.csv", "y", "1", "5")
    assert plan.settings == ("data.columns={prompt: query}",)
    assert "data.columns={prompt: query} would read it" in shown


def test_a_setting_can_be_written_after_the_name(answer, tiny_llama, tmp_path):
    path = tmp_path / "asked.csv"
    path.write_text("my words,topic\n" + "".join(f"{question},x\n" for question in QUESTIONS))
    reply = "asked.csv --set 'data.columns={prompt: my words}'"
    plan, shown = answer(tiny_llama, "asked.csv --set", "asked.csv", reply, "1", "5")
    assert plan.settings == ("data.columns={prompt: my words}",)
    assert "`--set 'data.columns={prompt: NAME}'` (such a setting can be written after the name)" in shown
    assert "would read it" not in shown


def test_preferences_are_offered_where_the_prompts_come_from_them(answer, tiny_llama, preferences):
    plan, shown = answer(tiny_llama, preferences, "", "", "")
    assert (plan.labels.source, plan.labels.label["data"]) == ("preferences", str(preferences))
    assert "30 rankings of 2 completions" in shown


def test_a_judge_and_a_function_are_checked_at_once(answer, tiny_llama, tiny_t5, questions, scoring, tmp_path):
    plan, shown = answer(tiny_llama, questions, "3", tiny_t5, tiny_llama, "")
    assert plan.labels.source == "judge"
    assert "encoder-decoder model, which cannot be a judge" in shown
    (tmp_path / "bad.py").write_text("def score(prompts, completions):\n    return 1\n")
    plan, shown = answer(tiny_llama, questions, "4", "judge.py", "bad.py:score", scoring, "")
    assert plan.labels.source == "reward"
    assert "write judge.py:score" in shown
    assert "not a list of scores" in shown


def test_an_encoder_decoder_can_only_be_rewarded_directly(answer, tiny_t5, questions, scoring):
    plan, shown = answer(tiny_t5, questions, "1", "4", scoring, "")
    assert plan.labels.source == "reward"
    assert "cannot be used" in shown


@pytest.mark.parametrize("written", ["'{}'", '"{}"', "{}"], ids=["quoted", "double quotes", "as it is"])
def test_a_path_with_spaces_may_be_written_as_in_a_shell(answer, tiny_llama, tmp_path, written):
    (tmp_path / "My Data").mkdir()
    (tmp_path / "My Data" / "it.txt").write_text("\n".join(QUESTIONS))
    plan, _ = answer(tiny_llama, written.format("My Data/it.txt"), "1", "")
    assert plan.prompts.source == "My Data/it.txt"
    plan, _ = answer(tiny_llama, "My\\ Data/it.txt", "1", "")
    assert plan.prompts.source == "My Data/it.txt"


def test_enter_goes_back_from_what_the_reply_leads_to(answer, tiny_llama, questions):
    replies = [tiny_llama, questions, "2", "nothing.csv", "", "3", "", "4", "", "1", ""]
    plan, shown = answer(*replies)
    assert plan.labels.source == "people"
    assert shown.count("Who says which completions are better?") == 4
    assert shown.count("(Enter alone goes back)") == 3


def test_nobody_is_asked_without_a_reader():
    with pytest.raises(UsageError):
        Questions(Given(), None).draft()


@pytest.mark.slow
def test_a_dialogue_in_a_terminal(tmp_path, tiny_llama, questions):
    (tmp_path / "mine.yaml").write_text("name: old\n")
    terminal = Terminal(80, "start", cwd=tmp_path)
    terminal.until("mine.yaml exists[^>]*> ")
    terminal.type("new.yaml\n")
    terminal.until(r"1\. Which model[^>]*> ")
    terminal.type(f"{tiny_llama}\n")
    assert "chat template" in terminal.until(r"2\. Which prompts[^>]*> ")
    terminal.type("quest\t\n")  # Tab completes the name of the file
    assert "30 prompts" in terminal.until(r"3\. Who says[^>]*> ")
    terminal.type("\n")
    terminal.until(r"4\. How many[^>]*> ")
    terminal.type("5\n")
    assert "limit of a completion: " in terminal.until("wrote new.yaml")
    assert "rlhf run new.yaml" in terminal.until("talk to the models")
    terminal.until("The run takes about")
    assert terminal.process.wait(timeout=60) == 0
    assert max(map(len, terminal.text.splitlines())) <= 120
    assert " ".join(terminal.text.split()).endswith("the time in which you rank")
    shown = screen_of(terminal.raw, 80)
    assert not [line for line in shown if line.endswith("...")], "a spinner stays on the screen"
    assert [line.split()[0] for line in shown if "\u2501" in line] == ["sampling", "measuring"], "a bar stays once"
    assert "steps: 5" in (tmp_path / "new.yaml").read_text()
    assert (tmp_path / "mine.yaml").read_text() == "name: old\n"


@pytest.mark.slow
def test_what_is_typed_during_the_spinner_answers_the_next_question(tmp_path):
    terminal = Terminal(80, "start", cwd=tmp_path)
    terminal.until(r"1\. Which model[^>]*> ")
    terminal.type("no model\n")
    terminal.until("reading its files")
    terminal.type("no other\n")
    shown = terminal.until("no other: no such model folder[^>]*> ")
    assert shown.index("no model: no such") < shown.index("> no other")
    time.sleep(1)  # as in the test below
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("no recipe was written")
    assert terminal.process.wait(timeout=60) == 1
    lines = [line for line in screen_of(terminal.raw, 80) if "reading its files" in line]
    assert lines == [], "a spinner stays on the screen"


@pytest.mark.slow
def test_ctrl_c_leaves_without_a_recipe(tmp_path):
    terminal = Terminal(80, "start", cwd=tmp_path)
    terminal.until(r"1\. Which model[^>]*> ")
    time.sleep(1)  # between the prompt and its wait for a key, readline keeps a signal until the key comes
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("no recipe was written")
    assert terminal.process.wait(timeout=60) == 1
    assert list(tmp_path.iterdir()) == []
