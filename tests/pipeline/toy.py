"""A run with fake stages, driven through the real command in a subprocess."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from rlhf_cli.cli import main
from rlhf_cli.pipeline import preflight
from rlhf_cli.stages.registry import stages

SCRIPT = Path(__file__).parent / "fake_stages.py"
RECIPE = """\
name: toy
model:
  path: base
data:
  prompts: prompts.jsonl
sft:
  data: demos.jsonl
label:
  by: function
  function: gold.py:score
train_rm:
ppo:
  steps: 3
evaluate:
  judge_function: gold.py:score
"""
ALL = ["sft", "label", "train-rm", "ppo", "evaluate"]


@dataclass
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict:
        return json.loads(self.stdout)

    @property
    def statuses(self) -> dict[str, str]:
        return {row["name"]: row["status"] for row in self.json["stages"]}


@dataclass
class Toy:
    """A folder with a recipe, a base model, data and a gold function."""

    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / "toy"

    def ran(self) -> list[str]:
        """Return the stages that ran since the last call, each with the content of its work folder."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            cwd=self.folder,
            env={**os.environ, "FAKE_LOG": str(self.log), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell that started the tests in the background lets them ignore it, and programs inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def rlhf(self, *arguments: str, **environment: str) -> Outcome:
        """Run the real command in this process, or in a new one if a stage will kill it."""
        if "FAKE_DIE" not in environment:
            return self._inside(arguments, {"FAKE_LOG": str(self.log), **environment})
        process = self.start(*arguments, **environment)
        stdout, stderr = process.communicate(timeout=120)
        return Outcome(process.returncode, stdout, stderr)

    def _inside(self, arguments: tuple[str, ...], environment: dict[str, str]) -> Outcome:
        stdout, stderr = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, environment),
            installed_stages(),
            mock.patch.object(sys, "argv", ["rlhf", *arguments]),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            warnings.catch_warnings(),
        ):
            code = main()
        return Outcome(code, stdout.getvalue(), stderr.getvalue())

    def run(self, *arguments: str, **environment: str) -> Outcome:
        return self.rlhf("run", "recipe.yaml", "--json", *arguments, **environment)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def fake_stages() -> types.ModuleType:
    specification = importlib.util.spec_from_file_location("fake_stages", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@contextlib.contextmanager
def installed_stages() -> Iterator[None]:
    """Replace the stage modules in `sys.modules` by fakes, and restore them afterwards."""
    names = [stage.module for stage in stages()]
    before = {name: sys.modules.pop(name, None) for name in names}
    replaced = {"check_models_of_run": mock.DEFAULT, "check_with_tokenizer": mock.DEFAULT}
    with mock.patch.multiple(preflight, **replaced):  # which `install` replaces
        fake_stages().install()
        yield
    for name in names:
        del sys.modules[name]
    sys.modules.update({name: module for name, module in before.items() if module is not None})


def make(folder: Path) -> Toy:
    made = Toy(folder)
    made.write("recipe.yaml", RECIPE)
    made.write("base/config.json", "{}")
    made.write("base/model.safetensors", "weights")
    made.write("demos.jsonl", "".join(f'{{"prompt": "p{i}", "completion": "c{i}"}}\n' for i in range(5)))
    made.write("prompts.jsonl", "".join(f'{{"prompt": "q{i}"}}\n' for i in range(5)))
    made.write("gold.py", "def score(prompts, completions):\n    return [0.0 for _ in completions]\n")
    return made


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """Nothing has run yet."""
    return make(tmp_path)


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make(tmp_path_factory.mktemp("finished"))
    assert made.run().code == 0
    made.ran()
    return made.folder


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Toy:
    """All stages have run, and the log is empty again."""
    shutil.copytree(finished_once, tmp_path, dirs_exist_ok=True)
    return Toy(tmp_path)
