"""Rules for the whole tree: no import cycles, no private names in tests, and the words of the field."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from rlhf_cli.stages.registry import REGISTRY

ROOT = Path(__file__).resolve().parents[1]


# Imports


@cache
def import_graph():
    import grimp

    return grimp.build_graph("rlhf_cli", exclude_type_checking_imports=True)


def cycle_of(graph: dict[str, set[str]]) -> str | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return None


def test_no_two_modules_import_each_other_not_even_inside_functions():
    graph = import_graph()
    assert cycle_of({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}) is None


def graph_of_children(package: str) -> dict[str, set[str]]:
    """The modules and packages directly in a package, and which of them import which."""
    graph = import_graph()
    children: dict[str, set[str]] = {}
    owner: dict[str, str] = {}
    for child in graph.find_children(package):
        children[child] = set()
        owner |= dict.fromkeys({child} | graph.find_descendants(child), child)
    for module, child in owner.items():
        imported = {owner[name] for name in graph.find_modules_directly_imported_by(module) if name in owner}
        children[child] |= imported - {child}
    return children


def test_no_two_packages_import_each_other():
    packages = [module for module in sorted(import_graph().modules) if import_graph().find_children(module)]
    assert [cycle for package in packages if (cycle := cycle_of(graph_of_children(package)))] == []


def test_the_independence_contract_lists_every_stage():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    contracts = tools["importlinter"]["contracts"]
    (listed,) = [contract["modules"] for contract in contracts if contract["type"] == "independence"]
    assert sorted(listed) == sorted(module.removesuffix(".stage") for module, _ in REGISTRY.values())


def test_a_cycle_is_found():
    assert cycle_of({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert cycle_of({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


# Private names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private names of `rlhf_cli` that a test imports, reads from an imported module, or replaces."""
    ours: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlhf_cli":
            ours |= {alias.asname or alias.name for alias in node.names}
            yield from (alias.name for alias in node.names if is_private(alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            yield from [node.attr] if is_private(node.attr) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            texts = [part.value for part in node.args[:2] if isinstance(part, ast.Constant)]
            yield from (last for text in texts if is_private(last := str(text).rpartition(".")[2]))


def test_no_test_uses_a_private_name():
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in (ROOT / "tests").rglob("*.py")
        for name in private_names(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert sorted(found) == []


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from rlhf_cli.a import _b", ["_b"]),
        ("from rlhf_cli import a\na._b()", ["_b"]),
        ("m.setattr('rlhf_cli.a._b', 1)", ["_b"]),
        ("m.setattr(a, '_b', 1)", ["_b"]),
        ("from rlhf_cli import a, __version__\na.__doc__\nself._b\nfrom other import _c", []),
    ],
)
def test_private_names_are_found(code, names):
    assert list(private_names(ast.parse(code))) == names


# Words


@dataclass(frozen=True)
class Word:
    """A word that the code avoids.

    Attributes:
        pattern: regular expression; it matches whole words.
        instead: what the code says.
        in_text: strings and comments are searched too, not only the names that the code defines.
        allowed: file -> why the word may stay there.
    """

    pattern: str
    instead: str
    in_text: bool = True
    allowed: tuple[str, ...] = ()


_COUNTED = r"(?:one|once|twice|times|bytes|lines?|numbers?|messages?|units|completions?|answers?|files?|\d+)"
_UNITS = r"(?:prompt|step|record|pair|token|row|process|label|item|stage|run|line|epoch|group|sequence|minibatch)"

_PLOTS = (
    "rlhf_cli/attention/bench_report.py",
    "rlhf_cli/attention/weights_view.py",
    "rlhf_cli/labeling/statistics/plot.py",
    "rlhf_cli/labeling/statistics/text_report.py",
)

MODEL_CARDS = (
    *("rlhf_cli/files.py", "rlhf_cli/report/model_card.py"),
    *("rlhf_cli/cli/push.py", "rlhf_cli/export/models.py", "rlhf_cli/export/push.py"),
)
"""Files about model cards."""

# Where a pattern stays, the comment beside `allowed` says why.
WORDS = [
    Word("leash", "KL penalty"),
    Word("laps?", "epoch"),
    Word("mend(?:s|ed|ing)?", "fix"),
    Word("actors?", "PPO models", allowed=("rlhf_cli/export/openrlhf.py", "rlhf_cli/export/verl.py")),  # their options
    Word("playing", "use_adapter"),
    # What scores completions there may be a function or a reward model.
    Word(
        "scorers?",
        "reward model",
        allowed=(
            "rlhf_cli/labeling/scoring.py",
            "rlhf_cli/stages/label/run.py",
            "rlhf_cli/stages/label/active_learning.py",
        ),
    ),
    Word("journal", "run logger"),
    Word("desk", "controller"),
    Word("remark(?:s|ed)?", "warning"),
    Word("labell?ers?", "annotator"),
    Word("forms?", "format", in_text=False),
    Word("wanted", "import options", in_text=False),
    # Decimal places.
    Word("places?", "location, path", in_text=False, allowed=("rlhf_cli/labeling/statistics/table.py",)),
    # Shells complete commands.
    Word(
        "shell",
        "classifier",
        in_text=False,
        allowed=("rlhf_cli/cli/app.py", "rlhf_cli/cli/completion.py", "rlhf_cli/cli/label/commands.py"),
    ),
    Word("card", "config", in_text=False, allowed=MODEL_CARDS),
    Word("room", "max_length, free space", in_text=False),
    # Hugging Face.
    Word("face", "app", in_text=False, allowed=("rlhf_cli/attention/hugging_face.py",)),
    # Matplotlib's figures.
    Word("figures?", "progress, metrics", in_text=False, allowed=_PLOTS),
    Word("together", "distributed", in_text=False),
    Word("answers?", "completion", in_text=False),
    Word("on end", "concatenated"),
    Word("of (?:it|them)sel(?:f|ves)", "finished, by itself"),
    Word("(?:go(?:es|ing)?|went) on (?:behind|from)", "resume from"),
    Word("(?:leav(?:es?|ing)|left) out", "skip, omit"),
    Word("(?<!there )(?:is|are) no(?! (?:longer|more|less|other|better)\\b)", "is not a, must be"),
    Word(f"{_COUNTED} an? {_UNITS}", "per"),
]


@dataclass(frozen=True)
class Source:
    """Names that a file defines and the texts in it, each with its line."""

    path: str
    names: tuple[tuple[int, str], ...]
    texts: tuple[tuple[int, str], ...]


@cache
def sources() -> list[Source]:
    return [source_of(path) for path in sorted((ROOT / "rlhf_cli").rglob("*.py"))]


def source_of(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    names, texts = [(1, part) for part in path.relative_to(ROOT).with_suffix("").parts], []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append((node.lineno, node.name))
        elif isinstance(node, ast.arg):
            names.append((node.lineno, node.arg))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.attr))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append((node.lineno, " ".join(node.value.split())))
    comments = tokenize.generate_tokens(io.StringIO(text).readline)
    texts += [(token.start[0], token.string) for token in comments if token.type == tokenize.COMMENT]
    return Source(path.relative_to(ROOT).as_posix(), tuple(names), tuple(texts))


def in_words(name: str) -> str:
    """`PPOModels`, `ppo_models` -> `ppo models`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).lower().strip()


def uses_of(word: Word, source: Source) -> list[str]:
    pattern = re.compile(rf"\b{word.pattern}\b", re.IGNORECASE)
    found = {f"{source.path}:{line}: `{name}`" for line, name in source.names if pattern.search(in_words(name))}
    for line, text in source.texts if word.in_text else ():
        for match in pattern.finditer(text):
            found.add(f"{source.path}:{line}: {text[max(0, match.start() - 30) : match.end() + 30]!r}")
    return sorted(found)


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word.instead)
def test_the_code_uses_the_words_of_the_field(word):
    found = [use for source in sources() if source.path not in word.allowed for use in uses_of(word, source)]
    assert not found, f"{len(found)} times `{word.pattern}`; say: {word.instead}\n" + "\n".join(found)


def test_words_are_found_in_names_texts_and_comments(tmp_path):
    path = ROOT / "rlhf_cli" / "x.py"
    source = Source(path.name, ((1, "PPOActors"), (2, "lap_count"), (3, "overlap")), ((4, "the mended file"),))
    assert [len(uses_of(Word(pattern, ""), source)) for pattern in ("actors?", "laps?", "mend(?:s|ed|ing)?")] == [1] * 3
    assert uses_of(Word("mend(?:s|ed|ing)?", "", in_text=False), source) == []
