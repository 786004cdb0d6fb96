"""What a shell completes, as its script asks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def complete(tmp_path, monkeypatch, capsys):
    for name in ("runs/alpha", "runs/beta", "runs/.hidden", "recipes", "data"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("mine.yaml", "notes.txt", "recipes/quickstart.yaml", "data/own.yml", ".secret.yaml"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf"])
    monkeypatch.setenv("_RLHF_COMPLETE", "complete_bash")

    def run(line: str) -> list[str]:
        from rlhf_cli.cli import main

        words = line.split(" ")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out.split()

    return run


def test_commands(complete):
    assert complete("rlhf wa") == ["watch"]
    assert {"run", "label", "completion"} <= set(complete("rlhf "))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("rlhf watch ", ["runs/alpha", "runs/beta"]),
        ("rlhf watch runs/b", ["runs/beta"]),
        ("rlhf -q diagnose da", ["data/"]),
        ("rlhf run m", ["mine.yaml"]),
        ("rlhf run ", ["data/", "mine.yaml", "recipes/", "runs/", "recipes/quickstart.yaml"]),
        ("rlhf run data/", ["data/own.yml"]),
        ("rlhf run mine.yaml --run-dir runs/a", ["runs/alpha"]),
        ("rlhf run mine.yaml --from tr", ["train-rm"]),
        ("rlhf label st", ["stats"]),
        ("rlhf label --jud", ["--judge"]),
        ("rlhf label stats runs/a", ["runs/alpha"]),
        ("rlhf ppo --reward-m", ["--reward-model"]),
        ("rlhf run https://example.com/x.ya", []),
    ],
)
def test_arguments_and_options(complete, line, found):
    assert complete(line) == found


def test_a_recipe_that_is_named_before_is_not_read(complete):
    assert complete("rlhf run https://127.0.0.1:1/x.yaml --from pp") == ["ppo"]


def test_nothing_heavy_is_imported_to_complete(complete):
    heavy = {"torch", "transformers", "httpx2", "rlhf_cli.recipe.schema"}
    before = {name: sys.modules.pop(name) for name in heavy if name in sys.modules}
    try:
        complete("rlhf watch ")
        complete("rlhf run mine.yaml --from ")
        assert not heavy & sys.modules.keys()
    finally:
        sys.modules.update(before)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_asks_this_program(shell):
    from typer.testing import CliRunner

    from rlhf_cli.cli.app import app

    done = CliRunner().invoke(app, ["completion", shell])
    assert done.exit_code == 0
    assert f"_RLHF_COMPLETE=complete_{shell}" in done.stdout


@pytest.mark.slow
def test_bash_completes_with_the_script(tmp_path):
    (tmp_path / "runs/alpha").mkdir(parents=True)
    program = Path(sys.executable).with_name("rlhf")
    script = f"""
        PATH={program.parent}:$PATH; eval "$(rlhf completion bash)"
        COMP_WORDS=(rlhf watch "") COMP_CWORD=2; _rlhf_completion rlhf; echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "runs/alpha\n", done.stderr
