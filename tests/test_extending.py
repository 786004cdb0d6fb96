"""docs/extending.md: its files and diffs, applied to a copy of the package, do what the page says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rlhf_cli.data.records import seed_for
from rlhf_cli.errors import Interrupted
from rlhf_cli.generation.generator import Generator, Request
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.prompts import PromptStyle
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.models.loading import ModelSource
from tests.stops import StopAtCheck

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
# Read as: a path on a line of its own, with a note in parentheses, and its blocks; or a command, indented by four.
PART = re.compile(
    r"^`(?P<path>[\w./]+)`(?P<note> \([^\n]*\))?$"
    r"|^```(?P<kind>\w+)\n(?P<body>.*?)^```$"
    r"|^    (?P<command>rlhf [^\n]*)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Section:
    """One section of the page.

    Attributes:
        files: path -> its blocks, (kind, text), in order.
        commands: without the notes beside them.
    """

    files: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    def touched(self) -> set[str]:
        """Files of the package."""
        return {path for path in self.files if path.startswith("rlhf_cli/")}


def section(title: str) -> Section:
    """Return the section with a title; "" is the introduction."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)" if title else r"\A(.*?)^## ", PAGE, re.M | re.S)
    found, path = Section(), ""
    for part in PART.finditer(text):
        if part["path"]:
            path = part["path"]
            found.files[path] = [("python", "")] if part["note"] == " (empty)" else []
        elif part["kind"]:
            found.files[path].append((part["kind"], part["body"]))
        else:
            found.commands.append(re.split(r"\s{3,}", part["command"])[0])
    return found


def patched(text: str, diff: str) -> str:
    """Apply one hunk, whose context must occur exactly once."""
    lines = diff.splitlines(keepends=True)
    assert {line[0] for line in lines} <= set(" +-"), diff
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(before) == 1, f"found {text.count(before)} times:\n{before}"
    return text.replace(before, after)


@dataclass
class ExtendedPackage:
    """A copy of the package with a section applied, and the folder that its commands run in."""

    folder: Path
    section: Section

    def __post_init__(self) -> None:
        # With what is compiled already, but for files that another process is about to write and to rename.
        shutil.copytree(ROOT / "rlhf_cli", self.package / "rlhf_cli", ignore=shutil.ignore_patterns("*.pyc.*"))
        for path, blocks in self.section.files.items():
            file = self.file(path)
            file.parent.mkdir(parents=True, exist_ok=True)
            assert blocks, f"`{path}` has no block"
            for kind, body in blocks:
                assert file.exists() == (kind == "diff"), path
                file.write_text(patched(file.read_text(), body) if kind == "diff" else body)

    @property
    def package(self) -> Path:
        return self.folder / "copy"

    def file(self, path: str) -> Path:
        """Return where a file of the page is."""
        return (self.package if path.startswith("rlhf_cli/") else self.folder) / path

    def run(self, command: str) -> str:
        """Run a command line of the page with the copy; returns its stdout."""
        program, *arguments = shlex.split(command)
        result = subprocess.run(
            [str(Path(sys.executable).with_name(program)), *arguments],
            cwd=self.folder,
            env=os.environ | {"CI": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.package)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def run_all(self) -> dict[str, str]:
        """Run the section's commands in order: command -> stdout."""
        return {command: self.run(command) for command in self.section.commands}

    def rows(self, path: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / path).read_text().splitlines()]


@pytest.fixture
def extended(tmp_path: Path, tiny_llama: Path) -> Callable[[str], ExtendedPackage]:
    """The package extended by a section, in a folder with the files of the introduction."""
    for path, [(_, body)] in section("").files.items():
        (tmp_path / path).write_text(body.replace("MODEL", str(tiny_llama)))
    return lambda title: ExtendedPackage(tmp_path, section(title))


def test_the_table_counts_the_files_of_every_section():
    titles = re.findall("^## (.*)$", PAGE, re.M)
    listed = re.findall(r"^\| \[(.*?)\]\(#(.*?)\) \| (\d)[ :]", PAGE, re.M)
    assert [name[0].upper() + name[1:] for name, _, _ in listed] == titles
    assert [anchor for _, anchor, _ in listed] == [title.lower().replace(" ", "-") for title in titles]
    assert [int(count) for *_, count in listed] == [len(section(title).touched()) for title in titles]


def test_a_stage(extended):
    extension = extended("A stage")
    assert len(extension.section.touched()) == 3
    printed = extension.run_all()
    assert "--prompts DATA" in printed["rlhf count --help"]
    assert "## `count`" in printed["rlhf recipe reference"]
    assert "prompts: prompts.jsonl" in printed["rlhf recipe show count.yaml"]
    assert "Count the prompts." in extension.run("rlhf --help")
    for run in ("default", "counted"):
        artifact = extension.folder / "runs" / run / "count"
        assert (artifact / "count.txt").read_text() == "4\n"
        assert json.loads((artifact / "manifest.json").read_text())["metrics"] == {"prompts": 4}
    again = json.loads(extension.run("rlhf run count.yaml --json"))
    assert [stage["status"] for stage in again["stages"]] == ["cached"]


def test_a_ppo_setting(extended):
    extension = extended("A PPO setting")
    assert len(extension.section.touched()) == 2
    printed = extension.run_all()
    assert "advantage_clip" in printed["rlhf recipe reference"]
    (row,) = [row for row in extension.rows("runs/default/ppo/metrics.jsonl") if "loss/policy_avg" in row]
    assert row["loss/policy_avg"] == pytest.approx(-0.5, abs=1e-6)


def test_a_reward(extended):
    extension = extended("A reward")
    extension.run_all()
    (row,) = extension.rows("runs/default/ppo/metrics.jsonl")
    parts = [row[f"objective/scores/{name}.py:score"] for name in ("brevity", "keywords")]
    assert parts[0] < 0 <= parts[1]
    assert row["objective/scores"] == pytest.approx(sum(parts))


def test_a_generator(extended, tiny_llama: Path):
    extension = extended("A generator")
    extension.run_all()
    namespace: dict = {}
    exec(extension.section.files["rlhf_cli/generation/shorter_of_two.py"][0][1], namespace)
    policy = Policy.load(ModelSource(str(tiny_llama)), Sampling(max_new_tokens=99), style=PromptStyle("chat"))
    lengths = []
    for row in extension.rows("runs/default/label/rankings.jsonl"):
        ids = policy.prompt_ids(row["prompt"])
        requests = [Request(ids, seed_for(row["prompt"], 0, number)) for number in range(3)]
        shorter: Generator = namespace["ShorterOfTwo"]()
        kept, drawn = (generator.generate(policy, requests) for generator in (shorter, TorchGenerator()))
        assert row["completions"] == [completion.text for completion in kept]
        lengths += [(len(one.ids), len(other.ids)) for one, other in zip(kept, drawn, strict=True)]
    assert all(one <= other for one, other in lengths)
    assert any(one < other for one, other in lengths)
    stop = StopAtCheck(3)
    with pytest.raises(Interrupted):
        shorter.generate(policy, requests, stop=stop.check)


def test_an_attention_backend(extended):
    extension = extended("An attention backend")
    listed, verified, _ = extension.run_all().values()
    assert "double     the equation in float64" in listed
    verdicts = [line.split()[-1] for line in verified.splitlines() if " double " in line]
    assert len(verdicts) > 10
    assert set(verdicts) == {"ok"}


def test_a_data_format(extended):
    extension = extended("A data format")
    extension.run_all()
    ranking = {"prompt": "q", "completions": ["a", "b", "c"], "ranking": [[0, 2], [1]]}
    assert extension.rows("rankings.jsonl") == [ranking]


def test_the_package_files_of_the_page_meet_our_lint_rules(tmp_path: Path):
    for title in re.findall("^## (.*)$", PAGE, re.M):
        extension = ExtendedPackage(tmp_path / title, section(title))
        files = [str(extension.file(path)) for path in extension.section.touched()]
        if not files:  # a reward of the user's own
            continue
        for arguments in (["check"], ["format", "--check"]):
            command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--config", str(ROOT / "pyproject.toml")]
            result = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
            assert result.returncode == 0, f"{title}\n{result.stdout}"
