"""Build the documentation as a site: `make docs`; the result is build/site/index.html.

The Markdown files are copied to build/pages in the layout of the repository, so that their links work in both. The page
of commands is generated from their help, and links to source files become plain text. Exit status: that of the build,
which treats a broken link or anchor as an error.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from rlhf_cli.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "pages"
COPIED = (
    "*.md",
    "docs/**/*.md",
    "docs/**/*.png",
    "docs/**/*.ipynb",
    "docs/*.css",
    "recipes/*.md",
    "data_samples/README.md",
)
WIDTH = 84
"""Columns of the help texts; more would need scrolling beside the navigation."""

_SOURCE_LINK = re.compile(r"\[([^\]]+)\]\((?:\.\./)+rlhf_cli[^)]*\)")
_COMMANDS = """\
# Commands

The help of every command, as `rlhf COMMAND --help` prints it.
"""


def copy_pages() -> None:
    """Copy what the site shows to build/pages."""
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            copy = PAGES / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".md":
                copy.write_text(_SOURCE_LINK.sub(r"\1", path.read_text(encoding="utf-8")), encoding="utf-8")
            else:
                shutil.copyfile(path, copy)


def helps(command: Any, context: Any) -> Iterator[tuple[str, str]]:
    """Yield the path and the help of a command and of the commands below it, without hidden ones."""
    if not isinstance(command, TyperGroup):
        yield context.command_path, command.get_help(context)
        return
    # `rlhf label` without a subcommand is its hidden command `stage`.
    own = command.get_command(context, "stage")
    yield (
        context.command_path,
        own.get_help(context_of(own, context.info_name, context.parent)) if own else command.get_help(context),
    )
    for name in command.list_commands(context):
        inner: Any = command.get_command(context, name)
        if not inner.hidden:
            yield from helps(inner, context_of(inner, name, context))


def context_of(command: Any, name: str, parent: Any = None) -> Any:
    """Return a context in which the help of a command has a fixed width."""
    return command.context_class(
        command, parent, name, terminal_width=WIDTH, help_option_names=["-h", "--help"], max_content_width=WIDTH
    )


def commands_page() -> str:
    """Return the page of commands."""
    root = typer.main.get_command(app)
    sections = helps(root, context_of(root, "rlhf"))
    parts = [f"## {path}\n\n```text\n{text.strip()}\n```\n" for path, text in sections]
    return "\n".join([_COMMANDS, *parts])


def main() -> int:
    """Write the pages and build the site."""
    shutil.rmtree(PAGES, ignore_errors=True)
    copy_pages()
    (PAGES / "docs" / "commands.md").write_text(commands_page(), encoding="utf-8")
    build = [Path(sys.executable).with_name("zensical"), "build", "--clean", "--strict"]
    return subprocess.run(build, cwd=ROOT, check=False).returncode  # noqa: S603


if __name__ == "__main__":
    raise SystemExit(main())
