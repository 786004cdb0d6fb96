"""Checks, before any stage starts, that all processes of a run see the same: settings, files, versions and code.

On several machines each process reads its own recipe, its own copy of data and models, and its own installation. Where
they differ, a run would not fail: it would train on a mixture.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import UsageError
from rlhf_cli.pipeline.manifest import versions
from rlhf_cli.recipe.fields import values
from rlhf_cli.recipe.schema import Recipe

COMPARED_WHOLE = 1 << 20
"""Bytes up to which all of a file is compared; of larger ones the size and both ends, so that it takes milliseconds."""
_END = 1 << 16
_MAX_FILES = 1000
"""Files of a folder that are compared."""
_MAX_SHOWN = 10
_PATIENCE = 10.0
"""Seconds for a new file to appear on another machine; network file systems keep listings for a few seconds."""
_FIXES = {
    "settings": "give all processes the same recipe and options",
    "files": "copy the files to all machines, or put them on a file system that all share, under the same path",
    "versions": "install the same versions on all machines (`pip freeze` on one, `pip install -r` on the others)",
    "code": "install the same rlhf on all machines",
    "folder": "put the run directory on a file system that all machines share, and name it with `--run-dir`",
}
"""What differs -> what to do about it."""

_Kind = str
View = Mapping[_Kind, Mapping[str, str]]
"""What a process sees: kind -> name -> value."""


def check_agreement(recipe: Recipe, folder: Path, processes: ProcessGroup) -> None:
    """Raise `UsageError` in every process unless all see the same; each process must call it at the same point.

    Args:
        recipe: with resolved paths.
        folder: the run directory; it exists in rank 0.
        processes: all processes of the run.
    """
    with _marker(folder, processes.is_main) as marker:
        mine = {"host": socket.gethostname(), "marker": marker, "view": view(recipe)}
        found = processes.all_gather_object(mine)
        sees = processes.all_gather_object(processes.is_main or _appears(folder / found[0]["marker"]))
    hosts = [str(one["host"]) for one in found]
    views: list[dict[_Kind, dict[str, str]]] = [one["view"] for one in found]
    for number, seen in enumerate(sees):
        views[number]["folder"] = {f"the run directory {folder}": "shared" if seen else "another folder"}
    if problems := differences(hosts, views):
        kinds = dict.fromkeys(kind for kind, _ in problems)
        lines = [text for _, text in problems]
        more = [f"and {len(lines) - _MAX_SHOWN} more differences"] if len(lines) > _MAX_SHOWN else []
        error = UsageError("\n".join(lines), hint="; ".join(_FIXES[kind] for kind in kinds))
        error.problems = [*lines[:_MAX_SHOWN], *more]
        raise error


def view(recipe: Recipe) -> dict[_Kind, dict[str, str]]:
    """Return what this process sees: settings, files, versions and code."""
    return {
        "settings": dict(_flat(recipe.model_dump(mode="json"), "")),
        "files": _files(recipe),
        "versions": versions(),
        "code": {"the code of rlhf": code_digest()},
    }


def differences(hosts: Sequence[str], views: Sequence[View]) -> list[tuple[_Kind, str]]:
    """Return how what processes see differs from what rank 0 sees: its kind, and a message that names them.

    Args:
        hosts: machine of each process.
        views: what each process sees.
    """
    ranks: dict[tuple[_Kind, str, str, str | None, str | None], list[int]] = {}
    for number, seen in enumerate(views[1:], 1):
        for kind, first in views[0].items():
            for name in sorted(first.keys() | seen[kind].keys()):
                here, there = first.get(name), seen[kind].get(name)
                if here != there:
                    ranks.setdefault((kind, hosts[number], name, here, there), []).append(number)
    return [
        (
            kind,
            f"rank{'s' * (len(who) > 1)} {', '.join(map(str, who))} of {len(views)} on {host}: {_shown(kind, name)} is "
            f"{there or 'missing'}, but {here or 'missing'} in rank 0 on {hosts[0]}",
        )
        for (kind, host, name, here, there), who in ranks.items()
    ]


def _shown(kind: _Kind, name: str) -> str:
    return f"`{name}`" if kind == "settings" else name


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the value of every setting."""
    if isinstance(value, dict | list) and value:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in entries:
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(value)


def _files(recipe: Recipe) -> dict[str, str]:
    """Return the size and digest of every local file that the recipe names; folders with the files in them."""
    found = {}
    for _, setting, value in values(recipe):
        if setting.external is None or value is None or not setting.external.applies_to(value):
            continue
        for name in value if isinstance(value, list) else [value]:
            path = Path(name.rpartition(":")[0] if ".py:" in name else name)
            inside = sorted(path.rglob("*"))[:_MAX_FILES] if path.is_dir() else [path]
            found |= {str(one): summary(one) for one in inside if one.is_file()}
    return found


def summary(file: Path) -> str:
    """Return the size of a file and a digest: of all of it if it is small, else of its ends."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            content = opened.read(COMPARED_WHOLE if size <= COMPARED_WHOLE else _END)
            if size > COMPARED_WHOLE:
                opened.seek(-_END, os.SEEK_END)
                content += opened.read(_END)
    except OSError as error:
        return f"unreadable ({(error.strerror or str(error)).lower()})"
    return f"{size:,} bytes (sha256 {hashlib.sha256(content).hexdigest()[:12]})"


def code_digest() -> str:
    """Return a digest of all source files of this package and their names."""
    root, total = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        total.update(f"{file.relative_to(root).as_posix()}\0".encode())
        total.update(file.read_bytes())
    return f"sha256 {total.hexdigest()[:12]}"


@contextlib.contextmanager
def _marker(folder: Path, is_main: bool) -> Iterator[str]:
    """In rank 0, a new file in the run directory while the others look for it; its name."""
    name = f".seen-{secrets.token_hex(8)}"
    if not is_main:
        yield name
        return
    (folder / name).touch()
    try:
        yield name
    finally:
        (folder / name).unlink(missing_ok=True)


def _appears(file: Path) -> bool:
    """Whether a file exists, or comes into view within seconds."""
    deadline = time.monotonic() + _PATIENCE
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
