"""How the documentation reads: short sentences, lines that fit, the words of the field, a short README.

Documents are Markdown files; the help of every command and the description of every setting are read as documents too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token
from typer.core import TyperGroup

from rlhf_cli.cli.app import app
from rlhf_cli.recipe.fields import section_of
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.base import Section
from tests.test_conventions import ROOT, WORDS, Source, Word, uses_of

MOST_WORDS, MOST_COLUMNS, MOST_README_WORDS = 40, 120, 700
PATTERNS = ("*.md", "docs/**/*.md", "recipes/*.md", "data_samples/README.md")
MARKDOWN = MarkdownIt("commonmark").enable("table")

# An abbreviation does not end a sentence.
SENTENCE_END = re.compile(r"(?<!\bet al)(?<!\be\.g)(?<!\bi\.e)(?<!\beq)(?<!\bvs)[.!?][)\"”]?\s+(?=[^a-z])")
URL_ONLY = re.compile(r"\s*(?:[-*]|\[[^]]*\]:)?\s*<?https?://\S+\s*")

# Beside the words that the code avoids (WORDS), what only prose can get wrong.
PROSE_WORDS = [
    Word(r"(?:labell|modell|cancell|travell|signall|unlabell)(?:ed|ing)", "one l: labeled, modeling"),
    Word(r"(?:behavi|col|fav|neighb)our\w*", "-or: behavior, color"),
    Word(r"(?:optim|normal|quant|general|initial|summar|recogn|regular|final|token)is(?:e[drs]?|ing|ations?)", "-ize"),
    Word(r"artefacts?", "artifact"),
    Word(
        r"(?:nats|seconds|minutes|answers?|questions?|pairs?|minibatch(?:es)?|tokens?) an? "
        r"(?:answer|question|epoch|episode|completion|ranking|second|minute|sentence)",
        "per",
    ),
]


def documents() -> list[Path]:
    return sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)})


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands(command: Any, path: str = "rlhf") -> Iterator[tuple[str, Any]]:
    """A command and the commands below it, each with its path."""
    yield path, command
    if isinstance(command, TyperGroup):
        context = typer.Context(command)
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), f"{path} {name}")


def helps() -> Iterator[tuple[str, str]]:
    """The help of every command and option, with what it belongs to."""
    for path, command in commands(typer.main.get_command(app)):
        for part in re.split(r"\n\s*\n", command.help or ""):
            # An indented or verbatim paragraph is an example or a list.
            if "\b" not in part and not any(line.startswith("  ") for line in part.splitlines()):
                yield path, part
        for parameter in command.params:
            yield f"{path} {parameter.name}", getattr(parameter, "help", None) or ""


def settings(section: type[Section], path: str = "recipe") -> Iterator[tuple[str, str]]:
    """The docstring of every section and the description of every setting, with its path."""
    yield path, section.__doc__ or ""
    for name, field in section.model_fields.items():
        yield f"{path}.{name}", field.description or ""
        if inner := section_of(field):
            yield from settings(inner, f"{path}.{name}")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs, headings and list items of Markdown with their first lines; a code span is one word.

    Code blocks, tables and comments are left aside.
    """
    table = False
    for token in MARKDOWN.parse(text):
        table = token.type == "table_open" or (table and token.type != "table_close")
        if token.type == "inline" and not table:
            yield (token.map or [0])[0] + 1, "".join(map(text_of, token.children or []))


def text_of(token: Token) -> str:
    if token.type in ("softbreak", "hardbreak"):
        return " "
    return "`code`" if token.type == "code_inline" else token.content if token.type == "text" else ""


def sentences(paragraph: str) -> list[str]:
    return [part for part in SENTENCE_END.split(" ".join(paragraph.split())) if part]


def too_long(text: str) -> list[str]:
    """Sentences of more than 40 words: where each begins, its length, and its first words."""
    return [
        f"{line}: {count} words: {sentence[:80]}"
        for line, paragraph in prose(text)
        for sentence in sentences(paragraph)
        if (count := len(re.findall(r"\S*\w\S*", sentence))) > MOST_WORDS
    ]


def too_wide(text: str) -> list[str]:
    """Lines of more than 120 columns, other than rows of tables and addresses."""
    return [
        f"{number}: {len(line)} columns: {line[:60]}"
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > MOST_COLUMNS and not line.lstrip().startswith("|") and not URL_ONLY.fullmatch(line)
    ]


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_a_document_has_short_sentences_and_lines_that_fit(path):
    text = path.read_text(encoding="utf-8")
    assert too_long(text) + too_wide(text) == []


@pytest.mark.parametrize("texts", [helps, lambda: settings(Recipe)], ids=["help", "settings"])
def test_help_and_descriptions_have_short_sentences(texts):
    assert [f"{where}:{found}" for where, text in texts() for found in too_long(text)] == []


@cache
def sources() -> list[Source]:
    return [Source(name_of(path), (), tuple(prose(path.read_text(encoding="utf-8")))) for path in documents()]


@pytest.mark.parametrize("word", WORDS + PROSE_WORDS, ids=lambda word: word.instead)
def test_documents_use_the_words_of_the_field(word):
    found = [use for source in sources() for use in uses_of(word, source)]
    assert not found, f"say: {word.instead}\n" + "\n".join(found)


def test_the_readme_is_short():
    words = len((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert words <= MOST_README_WORDS, f"{words} words"


def test_what_is_too_long_is_found():
    long = " ".join(["word"] * 41)
    assert too_long(f"Short one. A {long[:-5]}.")[0].startswith("1: 41 words")
    assert too_long(f"- item\n\n  {long}")[0].startswith("3: 41 words")
    assert too_long(f"A {long[:120]}. `a` {long[:120]} (Ouyang et al. 2022).") == []
    assert too_long(f"```\n{long}\n```\n\n    {long}\n\n| a |\n|---|\n| {long} |\n") == []
    assert too_wide(f"a\n{'b' * 121}\n| {'c' * 121} |\nhttps://{'d' * 121}\n")[0].startswith("2: 121 columns")
    assert len(too_wide(f"{'b' * 121}\n```\n{'c' * 121}\n```")) == 2
