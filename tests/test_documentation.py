"""What the documentation points at exists: links, pages of the site, commands, settings, files and versions."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML
from typer.core import TyperGroup
from typer.testing import CliRunner

from rlhf_cli import __version__
from rlhf_cli.cli.app import app
from rlhf_cli.recipe.fields import section_of
from rlhf_cli.recipe.schema import Recipe
from tests.test_conventions import ROOT
from tests.test_prose import documents, name_of

NOTEBOOK = ROOT / "docs" / "notebooks" / "first-run.ipynb"
INSTRUCTGPT = (ROOT / "docs" / "instructgpt.md").read_text(encoding="utf-8")
GENERATED = {"docs/commands.md"}
"""Pages that the site has and the repository has not."""
NOT_OF_TODAY = {"CHANGELOG.md", "docs/log.md", "docs/extending.md"}
"""Pages with commands as they were, or as they are after a change that the page describes."""


# Links and pages


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_links_lead_to_files(path):
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (path.parent / target).exists()] == []


def pages_of(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from pages_of(inner)


def test_the_navigation_of_the_site_has_every_page_once():
    site = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    listed = list(pages_of(site["nav"]))
    decisions = {name for name in map(name_of, documents()) if re.match(r"docs/decisions/\d", name)}
    assert sorted(listed) == sorted({*map(name_of, documents()), *GENERATED} - decisions)


def test_the_list_of_decisions_has_their_titles():
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(r"- \[(\d+)\]\((.+)\): (.+)", (folder / "README.md").read_text(encoding="utf-8"))
    found = [(path, path.read_text(encoding="utf-8").splitlines()[0]) for path in sorted(folder.glob("[0-9]*.md"))]
    assert [(name, f"# {number}: {title}") for number, name, title in listed] == [(p.name, head) for p, head in found]


# Commands


def commands_in(text: str) -> Iterator[str]:
    """The `rlhf` command lines of code blocks, those that go on after a backslash as one."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        found = re.match(r"(?: {4}|!|)(rlhf [a-z-]+.*)", line)
        if found and "run https://" not in line:  # a recipe at an address is read while the command line is parsed
            yield re.split(r" [#>] |\s{2,}", found[1])[0].strip()


def sources_of_commands() -> Iterator[tuple[str, str]]:
    for path in documents():
        if name_of(path) not in NOT_OF_TODAY:
            yield name_of(path), path.read_text(encoding="utf-8")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    yield name_of(NOTEBOOK), "\n".join("".join(cell["source"]) for cell in cells)


def parse(command: Any, words: list[str], parent: Any = None) -> None:
    """Parse a command line, and run nothing.

    Raises:
        Exception: the command does not exist, or does not take these arguments.
    """
    if isinstance(command, TyperGroup) and len(words) > 1:
        context = command.make_context(words[0], [], parent=parent, resilient_parsing=True)
        if inner := command.get_command(context, words[1]):
            return parse(inner, words[1:], context)
        if not words[1].startswith("-") and not (words[0] == "label" and words[1].endswith(".yaml")):  # its stage
            raise LookupError(f"no such command: {words[1]}")
    command.make_context(words[0], words[1:], parent=parent)
    return None


@pytest.mark.parametrize(
    ("name", "text"), list(sources_of_commands()), ids=lambda value: value if "\n" not in value else ""
)
def test_documented_commands_parse(name, text):
    for line in commands_in(text):
        try:
            parse(typer.main.get_command(app), shlex.split(line))
        except Exception as error:
            pytest.fail(f"{name}: {line}: {error}")


def test_commands_are_found_in_the_documents():
    found = [line for _, text in sources_of_commands() for line in commands_in(text)]
    assert {line.split()[1] for line in found} >= {
        "start",
        "run",
        "sft",
        "label",
        "train-rm",
        "ppo",
        "evaluate",
        "chat",
    }


def test_the_notebook_runs_up_to_the_training(tmp_path, monkeypatch):
    """The commands run as far as `--dry-run` does; the rest is Python that compiles, and no outputs are stored."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    for cell in cells:
        ast.parse(re.sub(r"^(\s*)[!%].*", r"\1pass", cell, flags=re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    ran = [line for line in commands_in("\n".join(cells)) if line.startswith(("rlhf quickstart", "rlhf run"))]
    for line in ran:
        arguments = [*shlex.split(line)[1:], *(() if "--dry-run" in line else ("--dry-run",))]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, (line, done.output)
    assert len(ran) == 3


# The page of InstructGPT


def has_setting(path: str) -> bool:
    section = Recipe
    for name in path.split("."):
        if section is None or name not in section.model_fields:
            return False
        section = section_of(section.model_fields[name])
    return True


def test_the_settings_of_the_page_exist():
    named = re.findall(r"`((?:data|sft|label|train_rm|ppo|evaluate)(?:\.[a-z_]+)+)`", INSTRUCTGPT)
    assert len(named) > 30
    assert [path for path in named if not has_setting(path)] == []
    assert not has_setting("ppo.no_such_setting")


def test_the_files_and_functions_of_the_page_exist():
    named = re.findall(r"`([a-z_/]+)\.py(?::(\w+))?`", INSTRUCTGPT)
    assert len(named) > 20
    for path, name in named:
        assert (ROOT / "rlhf_cli" / f"{path}.py").is_file(), path
        assert not name or hasattr(import_module(f"rlhf_cli.{path.replace('/', '.')}"), name), (path, name)


def test_the_recipe_of_the_page_has_the_papers_numbers():
    (block,) = re.findall(r"```yaml\n(.*?)```", INSTRUCTGPT, flags=re.DOTALL)
    recipe = Recipe.model_validate(YAML(typ="safe").load(block))
    assert recipe.ppo is not None
    assert recipe.ppo.steps * recipe.ppo.prompts_per_step == 256_000
    assert recipe.ppo.prompts_per_step / recipe.ppo.minibatches == 64
    assert recipe.ppo.steps * recipe.ppo.warmup_share == 10


def test_the_citation_is_of_this_version():
    citation = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == __version__
    assert citation["license"] == project["license"]
    assert citation["keywords"] == project["keywords"]
    assert citation["authors"]
    assert {"cff-version", "message", "title"} <= citation.keys()
