"""Checks which names a Python file defines, without running it."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import sys
from pathlib import Path

from rlhf_cli.errors import UsageError


def check_defined(file: Path, function: str, setting: str, *, arguments: int = 0) -> None:
    """Raise `UsageError` if the source of a file shows that a function cannot be loaded or called.

    It may define no such name, import a module that is not installed, or take too few arguments.

    A misspelled reward function is found before the first stage, not after an hour of other stages.

    Args:
        file: Python source file.
        function: name of the function.
        setting: setting that names the function, for messages.
        arguments: number of positional arguments that it is called with; 0 checks none.
    """
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except SyntaxError as error:
        raise UsageError(f"{file}:{error.lineno}: {error.msg} (`{setting}`)") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as Python: {error} (`{setting}`)") from error
    _check_imports(tree, file, setting)
    _check_arguments(tree, file, function, setting, arguments)
    known: set[str] = set()
    for node in ast.walk(tree):
        if _is_dynamic(node):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            known.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            known |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
    if function not in known and "__getattr__" not in known:
        near = difflib.get_close_matches(function, known, n=1, cutoff=0.6)
        listed = f"it defines: {', '.join(sorted(known))}" if known else None
        raise UsageError(
            f"`{file}` has no function `{function}` (`{setting}`)",
            hint=f"did you mean `{near[0]}`?" if near else listed,
        )


def _check_imports(tree: ast.Module, file: Path, setting: str) -> None:
    """Look for the modules that a file imports at its beginning, before any other code could change where they are."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module] if node.module and not node.level else []
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            continue
        else:
            return
        for module in modules:
            name = module.partition(".")[0]
            if name not in sys.modules and importlib.util.find_spec(name) is None:
                raise UsageError(
                    f"{file}:{node.lineno}: no Python module `{name}` (`{setting}`)",
                    hint=f"install it in this environment, or add its folder to PYTHONPATH ({sys.executable} runs it)",
                )


def _check_arguments(tree: ast.Module, file: Path, function: str, setting: str, count: int) -> None:
    found = [node for node in tree.body if getattr(node, "name", "") == function]
    if len(found) != 1 or not isinstance(found[0], ast.FunctionDef) or found[0].decorator_list:
        return
    takes = found[0].args
    positional = [*takes.posonlyargs, *takes.args]
    if takes.vararg is None and len(positional) < count:
        raise UsageError(
            f"{file}:{found[0].lineno}: `{function}` takes {len(positional)} of the {count} arguments that it "
            f"is called with (`{setting}`)",
            hint=f"define it as `def {function}(prompts, completions):`",
        )


def _is_dynamic(node: ast.AST) -> bool:
    """Whether a node may define names that the source does not show."""
    if isinstance(node, ast.ImportFrom):
        return any(alias.name == "*" for alias in node.names)
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "globals", "exec", "vars")
