"""The command line: help, errors, imports, and the small commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import preloaded

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "pyarrow", "tokenizers", "safetensors")


def rlhf(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return preloaded.run(arguments, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text("name: r\nmodel: {path: m}\nsft: {data: d.jsonl}\nppo: {prompts: d.jsonl}\n")
    (tmp_path / "m").mkdir()
    (tmp_path / "d.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    (tmp_path / "f.py").write_text("def f(p, c): return [0.0] * len(c)\n")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["ppo", "--help"],
        ["diagnose", "--help"],
        ["recipe", "show", "r.yaml"],
        ["recipe", "validate", "r.yaml"],
        ["recipe", "schema"],
    ],
)
def test_commands_that_load_no_model_import_nothing_heavy(folder, arguments):
    program = (
        "import sys; from rlhf_cli.cli import main; code = main()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_help_does_not_even_import_the_schema():
    program = "import sys; from rlhf_cli.cli import main; main(); print('rlhf_cli.recipe.schema' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_no_arguments_show_help():
    done = rlhf()
    assert done.returncode == 0
    for command in (
        "start",
        "init",
        "run",
        "sft",
        "label",
        "train-rm",
        "ppo",
        "evaluate",
        "diagnose",
        "recipe",
        "doctor",
    ):
        assert f"\n  {command} " in done.stdout


def test_version():
    from rlhf_cli import __version__

    assert rlhf("--version").stdout == f"rlhf {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rn"], "error: no such command 'rn', did you mean 'run'?"),
        (
            ["label", "stat"],
            "error: `rlhf label stat`: no such command and no such recipe, did you mean `rlhf label st",
        ),
        (["run"], "error: missing argument"),
        (["run", "r.yaml", "--jsn"], "error: no such option: --jsn"),
        (["run", "r.yaml", "--seed", "x"], "error: `--seed` must be a whole number; got x\n"),
        (["run", "r.yaml", "--processes", "0"], "error: `--processes` must be at least 1; got 0\n"),
        (["watch", "run", "--port", "70000"], "error: `--port` must be at most 65535; got 70000\n"),
        (["plan", "r.yaml", "--interconnect", "-2"], "error: `--interconnect` must be at least 0.1; got -2\n"),
        (["run", "none.yaml"], "error: none.yaml: no such recipe"),
        (["ppo", "--set", "ppo.stps=3"], "error: --set ppo.stps=3: unknown setting `ppo.stps`, did you mean `steps`?"),
        (["run", "r.yaml", "--seed", "-3"], "error: --seed -3: `seed` must be at least 0; got -3"),
    ],
)
def test_usage_errors(folder, arguments, said):
    done = rlhf(*arguments, cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_error_is_followed_by_a_blank_line_and_a_hint(folder):
    done = rlhf("run", "r.yaml", cwd=folder)
    assert done.stderr == (
        "error: no reward model in runs/r: `ppo` reads the output of `train-rm`\n\n"
        "hint: run `rlhf train-rm` with `--run-dir runs/r` first, or specify one with `--set ppo.reward_model=PATH`, "
        "or use another reward with `--function` or `--reward-url`\n"
    )


def test_every_problem_is_on_its_own_line(folder):
    (folder / "r.yaml").write_text("nme: x\nppo:\n  learning_rat: 1\n  steps: -1\n")
    done = rlhf("recipe", "validate", "r.yaml", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: r.yaml:1: unknown setting `nme`, did you mean `name`?",
        "error: r.yaml:3: unknown setting `ppo.learning_rat`, did you mean `learning_rate`?",
        "error: r.yaml:4: `ppo.steps` must be at least 1; got -1",
    ]


def test_escape_sequences_of_a_recipe_do_not_reach_the_terminal(folder):
    (folder / "r.yaml").write_text('"\\e[31mred": 1\n')
    done = rlhf("recipe", "validate", "r.yaml", cwd=folder)
    assert "\x1b" not in done.stderr
    assert "\\x1b[31mred" in done.stderr


def test_validate_prints_only_to_stderr(folder):
    done = rlhf("recipe", "validate", "r.yaml", cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "r.yaml: no problems\n")


def test_show_prints_changes_or_all(folder):
    changed, every = (rlhf("recipe", "show", "r.yaml", *more, cwd=folder).stdout for more in ((), ("--all",)))
    assert "gamma" not in changed
    assert "prompts: d.jsonl" in changed
    assert "gamma: 1.0" in every


def test_show_takes_set_and_json(folder):
    done = rlhf("recipe", "show", "r.yaml", "--set", "ppo.steps=7", "--json", cwd=folder)
    assert json.loads(done.stdout)["derived"]["ppo"]["optimizer steps in total"] == 28


def test_schema_is_json(folder):
    assert json.loads(rlhf("recipe", "schema").stdout)["properties"]["ppo"]


def test_a_closed_pipe_is_not_an_error(folder):
    program = (
        f"{sys.executable} -c 'import sys; from rlhf_cli.cli import main; sys.exit(main())' recipe schema | head -1"
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_init_writes_a_starter_and_overwrites_nothing(tmp_path):
    done = rlhf("init", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mine\n"
    copied = {path.relative_to(tmp_path / "mine") for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    for part in ("recipes", "data_samples"):
        for path in (ROOT / part).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(ROOT) in copied
    recipe = tmp_path / "mine" / "recipes" / "quickstart.yaml"
    line, _, rest = recipe.read_text().partition("\n")
    assert rest == (ROOT / "recipes" / "quickstart.yaml").read_text()
    schema = recipe.parent / line.removeprefix("# yaml-language-server: $schema=")
    assert json.loads(schema.read_text())["$id"].startswith("urn:rlhf-cli:recipe:")
    again = rlhf("init", "mine", cwd=tmp_path)
    assert again.returncode == 2
    assert "already exists" in again.stderr


def test_doctor_lists_the_tested_versions():
    done = subprocess.run([preloaded.RLHF, "doctor", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["torch"]
    assert found["problems"] == []
    assert found["device"]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    for name, version in found["tested"].items():
        assert f"{name}=={version}" in constraints
