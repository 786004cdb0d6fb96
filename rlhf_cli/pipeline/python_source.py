"""Checks which names a Python file defines, without running it."""

from __future__ import annotations

import ast
import difflib
from pathlib import Path

from rlhf_cli.errors import UsageError


def check_defined(file: Path, function: str, setting: str) -> None:
    """Raise `UsageError` if the source of a file shows that it does not define a name.

    A misspelled reward function is found before the first stage, not after an hour of other stages.

    Args:
        file: Python source file.
        function: name of the function.
        setting: setting that names the function, for messages.
    """
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except SyntaxError as error:
        raise UsageError(f"{file}:{error.lineno}: {error.msg} (`{setting}`)") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as Python: {error} (`{setting}`)") from error
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


def _is_dynamic(node: ast.AST) -> bool:
    """Whether a node may define names that the source does not show."""
    if isinstance(node, ast.ImportFrom):
        return any(alias.name == "*" for alias in node.names)
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "globals", "exec", "vars")
