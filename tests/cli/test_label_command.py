"""`rlhf label` as people type it: who labels, what waits, what is refused, in the real command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_cli import storage
from rlhf_cli.cli.label.human import AnnotationInterface, label_by_annotators
from rlhf_cli.errors import WaitingForLabelsError
from rlhf_cli.labeling.label_sources import STORE
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Entry
from rlhf_cli.labeling.web import serving


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"question {n}", "completions": [f"answer {n}.{k}" for k in range(2)]} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rank_all(run_dir: Path, name: str = "Ann") -> None:
    session = LabelSession(run_dir / STORE, create=False)
    who = session.annotator(name).id
    while (task := session.next(who)) is not None:
        session.submit(who, task.id, Entry(((0,), (1,))), key=f"key {task.id}", active_seconds=0)
    session.close()


def test_a_finished_stage_that_needs_more_labels_can_be_labeled_again(rlhf, answers, tmp_path):
    run = tmp_path / "run"
    command = ("label", "--by", "human", "--items", answers, "--run-dir", run)
    rlhf(*command, code=76)
    rank_all(run)
    rlhf(*command)
    assert "`label` is done" in rlhf("label", "--run-dir", run).stderr
    again = rlhf(*command, "--overlap", "2", code=76)
    assert "3 labels are missing" in " ".join(again.stderr.split())
    assert "needs an interactive terminal" in rlhf("label", "--run-dir", run, code=2).stderr
    rank_all(run, "Bo")
    rlhf(*command, "--overlap", "2")
    labels = [json.loads(line) for line in (run / "label" / "labels.jsonl").read_text().splitlines()]
    assert sorted(label["annotator"] for label in labels) == ["Ann"] * 3 + ["Bo"] * 3


def test_more_answers_than_letters_are_refused_by_their_line(rlhf, tmp_path):
    path = tmp_path / "many.jsonl"
    rows = [{"prompt": "q", "completions": [f"{n}" for n in range(count)]} for count in (16, 17)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused = rlhf("label", "--by", "human", "--items", path, "--run-dir", tmp_path / "run", code=65)
    assert f"{path}:2 has 17 completions" in refused.stderr


def test_who_has_no_name_is_asked_for_one_and_others_never(rlhf, answers, tmp_path):
    nameless = {"LOGNAME": "", "USER": "", "LNAME": "", "USERNAME": ""}
    code = (
        "import getpass, sys\n"
        "def nobody(): raise KeyError('uid not found')\n"
        "getpass.getuser = nobody\n"
        "from rlhf_cli.cli import main\n"
        "sys.exit(main())\n"
    )

    def run(*arguments):
        command = [sys.executable, "-c", code, "label", *map(str, arguments), "--run-dir", str(tmp_path / "run")]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | nameless | {"CI": "1"})

    waiting = run("--by", "human", "--items", answers)
    assert waiting.returncode == 76, waiting.stderr
    asked = run("--by", "human", "--items", answers, "--serve", "--port", "0")
    assert asked.returncode == 2
    assert "--annotator NAME" in asked.stderr


def test_a_run_that_does_not_wait_is_named(rlhf, tmp_path):
    assert "nowhere: no such run directory" in rlhf("label", "--run-dir", "nowhere", code=2).stderr
    (tmp_path / "idle").mkdir()
    assert "idle: this run does not wait for labels" in rlhf("label", "--run-dir", "idle", "--serve", code=2).stderr


def test_an_address_without_its_scheme_is_no_model(rlhf, answers):
    refused = rlhf("label", "--judge", "gpt@127.0.0.1:9191/v1", "--items", answers, code=2)
    assert "write gpt@http://127.0.0.1:9191/v1" in refused.stderr


def test_several_people_do_not_share_a_keyboard(rlhf, answers, tmp_path):
    refused = rlhf("label", "--by", "human", "--items", answers, "--annotator", "a", "--annotator", "b", code=2)
    assert "only one annotator can label in a terminal" in refused.stderr


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 76)])
def test_a_page_that_is_stopped_says_how(answers, tmp_path, signum, code):
    command = [str(Path(sys.executable).with_name("rlhf")), "label", "--by", "human", "--items", str(answers)]
    command += ["--run-dir", str(tmp_path / "run"), "--serve", "--port", "0", "--annotator", "Ann"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said = ""
    while "stop the server with Ctrl-C" not in said:
        line = process.stderr.readline()
        assert line, f"the page ended early: {said}"
        said += line
    assert "http://127.0.0.1:" in said
    assert "Ann" in said
    time.sleep(0.1)
    process.send_signal(signum)
    assert process.wait(timeout=30) == code
    assert process.stdout.read() == ""


def test_a_copy_that_is_behind_when_the_page_closes_is_a_warning_and_the_stage_goes_on(
    rlhf, answers, tmp_path, monkeypatch, capsys
):
    run, far = tmp_path / "run", tmp_path / "far"
    rlhf("label", "--by", "human", "--items", answers, "--run-dir", run, "--remote", f"file://{far}", code=76)
    monkeypatch.setattr(storage, "PAUSE", 0.0)
    calls = []

    def stage(force: bool) -> None:
        calls.append(force)
        if len(calls) == 1:
            raise WaitingForLabelsError("3 labels are missing", store=str(run / STORE))

    def serve(*_: object, **__: object) -> None:
        rank_all(run)
        shutil.rmtree(far)
        far.write_text("away")

    monkeypatch.setattr(serving, "serve", serve)
    page = AnnotationInterface(serve=True, host="127.0.0.1", port=0, annotators=("Ann",))
    label_by_annotators(stage, lambda: None, page, waits_in=None, force=False)
    assert calls == [False, False]
    assert f"the remote copy is behind {run}: " in capsys.readouterr().err


def test_the_stage_and_what_can_be_done_with_labels_share_one_name(rlhf):
    help_text = rlhf("label", "--help").stdout
    assert "Usage: rlhf label [OPTIONS] [RECIPE]\n" in help_text
    assert "  [RECIPE]  Recipe: " in help_text
    assert "Usage: rlhf label stats" in rlhf("label", "stats", "--help").stdout
    assert "no such option: --bogus" in rlhf("label", "--bogus", code=2).stderr
    commands = rlhf("--help").stdout.split("Commands:")[1].split("\n")
    names = [line.split()[0] for line in commands if line.startswith("  ") and line.strip() and line[2] != " "]
    assert names[:10] == ["quickstart", "start", "init", "plan", "run", "sft", "label", "train-rm", "ppo", "evaluate"]
