"""`--quiet`, `--verbose`, JSON errors and the log, through the real command with fake stages."""

from __future__ import annotations

import json

import pytest

from rlhf_cli.verbosity import Verbosity, set_verbosity
from tests.pipeline.toy import finished, finished_once, toy

__all__ = ["finished", "finished_once", "toy"]

PRINTS = [f"{stage} prints to stdout, where only data belongs" for stage in ("sft", "label", "train-rm", "ppo")]


def log_of(toy) -> str:
    return (toy.run_dir / "log.txt").read_text()


def test_the_log_has_the_messages_of_all_attempts_and_their_errors(toy):
    first = toy.rlhf("run", "recipe.yaml", FAKE_RAISE="ppo:diverged")
    assert first.code == 70
    second = toy.rlhf("run", "recipe.yaml")
    assert second.code == 0
    said = [line.rstrip() for line in (first.stderr + second.stderr).splitlines() if line.strip()]
    logged = [line.partition("Z  ")[2] for line in log_of(toy).splitlines() if not line.endswith("Z")]
    assert [line for line in logged if not line.startswith("$ ")] == said
    assert sum(line == "$ rlhf run recipe.yaml" for line in logged) == 2
    assert "error: loss was nan in 3 steps in a row" in logged


@pytest.mark.parametrize("arguments", [["-q", "run", "recipe.yaml"], ["run", "recipe.yaml", "--quiet"]])
def test_quiet_before_and_after_the_command(toy, arguments):
    done = toy.rlhf(*arguments)
    assert done.code == 0
    assert done.stdout == "runs/toy/evaluate\n"
    assert done.stderr.splitlines()[:4] == PRINTS, "what code of the user prints, and nothing of ours"
    assert "sft: starting" not in done.stderr
    assert "sft: starting" in log_of(toy)


def test_quiet_prints_errors(toy):
    done = toy.rlhf("run", "recipe.yaml", RLHF_QUIET="1", FAKE_RAISE="sft:diverged")
    assert done.stderr.splitlines()[1:] == ["error: loss was nan in 3 steps in a row"]


def test_the_command_line_decides_before_the_environment(toy):
    assert "Traceback" not in toy.rlhf("run", "none.yaml", "-q", RLHF_VERBOSE="1").stderr
    assert "sft: starting" not in toy.rlhf("run", "recipe.yaml", RLHF_QUIET="1", RLHF_VERBOSE="0").stderr


@pytest.mark.parametrize("arguments", [["-v", "run", "none.yaml"], ["run", "none.yaml", "--verbose"]])
def test_verbose_prints_a_traceback_and_keeps_message_and_exit_code(toy, arguments):
    done = toy.rlhf(*arguments)
    assert done.code == 2
    assert done.stderr.startswith("Traceback")
    assert "\nerror: none.yaml: no such recipe\n\nhint: " in done.stderr


def test_quiet_excludes_verbose(toy):
    done = toy.rlhf("-q", "run", "recipe.yaml", "-v")
    assert (done.code, "exclude each other" in done.stderr) == (2, True)


def test_a_group_takes_them_before_and_after_its_commands(toy):
    for arguments in (["label", "-q", "stats", "runs/none"], ["recipe", "validate", "recipe.yaml", "-q"]):
        done = toy.rlhf(*arguments)
        assert "no such option" not in done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "exit_code", "begins"),
    [
        (["run", "none.yaml"], {}, "recipe", 2, "none.yaml: no such recipe"),
        (["run", "recipe.yaml", "--sed", "3"], {}, "usage", 2, "no such option: --sed"),
        (["run", "recipe.yaml"], {"FAKE_RAISE": "ppo:diverged"}, "diverged", 70, "loss was nan"),
        (["run", "recipe.yaml"], {"FAKE_RAISE": "sft:bug"}, "bug", 1, "this is a bug in rlhf"),
        (["run", "recipe.yaml"], {"FAKE_RAISE": "sft:interrupt"}, "interrupted", 130, "stopped by SIGINT"),
        (["diagnose", "runs/none"], {}, "usage", 2, "runs/none: no such run directory"),
    ],
)
def test_an_error_is_an_object_where_the_result_would_be(toy, arguments, environment, code, exit_code, begins):
    done = toy.rlhf(*arguments, "--json", **environment)
    assert done.code == exit_code
    error = done.json["error"]
    assert {name: error[name] for name in ("version", "code", "exit_code")} == {
        "version": 1, "code": code, "exit_code": exit_code,
    }  # fmt: skip
    assert error["message"].startswith(begins)
    assert set(error) == {"version", "code", "exit_code", "message", "hint"}
    assert f"error: {begins}" in done.stderr, "people read it too"


def test_links_of_annotators_are_shown_and_not_logged(tmp_path, monkeypatch, capsys):
    from rlhf_cli import run_log
    from rlhf_cli.cli.label.human import AnnotationInterface, label_by_annotators
    from rlhf_cli.errors import Interrupted, WaitingForLabelsError
    from rlhf_cli.labeling.web import serving
    from rlhf_cli.labeling.web.tokens import ServerLinks

    def stage(force: bool) -> None:
        with run_log.logged(tmp_path / "log.txt", "$ rlhf label"):
            raise WaitingForLabelsError("3 labels remain", store=str(tmp_path / "a" / "b" / "c" / "labels.sqlite"))

    def serve(store, *, announce, **_) -> None:
        announce(ServerLinks("http://127.0.0.1", "http://127.0.0.1/admin?secret", {"ann": "http://127.0.0.1/?secret"}))
        raise Interrupted(15)

    monkeypatch.setattr(serving, "serve", serve)
    interface = AnnotationInterface(True, "127.0.0.1", 0, ("ann",))
    set_verbosity(Verbosity.QUIET)
    try:
        with pytest.raises(Interrupted):
            label_by_annotators(stage, lambda: None, interface, waits_in=None, force=False)
    finally:
        set_verbosity(Verbosity.NORMAL)
    assert capsys.readouterr().err.count("secret") == 2
    assert "secret" not in (tmp_path / "log.txt").read_text()


def test_without_json_stdout_stays_empty(toy):
    assert toy.rlhf("run", "none.yaml").stdout == ""


def test_a_result_is_no_error(finished):
    assert "error" not in finished.run().json


def test_the_guide_lists_every_code():
    from pathlib import Path

    from rlhf_cli import errors

    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    codes = {one.code for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.RLHFError)}
    assert [code for code in sorted(codes | {"bug", "stdout"}) if f"`{code}`" not in guide] == []


@pytest.mark.slow
def test_of_several_processes_one_object_and_one_log(toy):
    done = toy.start("run", "recipe.yaml", "--json", "--processes", "2", FAKE_RAISE="sft:diverged", FAKE_RANK="1")
    stdout, stderr = done.communicate(timeout=120)
    assert done.returncode == 70, stderr
    assert json.loads(stdout)["error"]["code"] == "diverged"
    log = log_of(toy)
    assert log.count("error: loss was nan in 3 steps in a row") == 1
    assert log.count("sft: starting") == 1
    assert "rank 1 of 2 failed" in log
