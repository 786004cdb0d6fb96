"""Models that come with their own Python code, which only `model.trust_remote_code` lets run.

The permission is for the code of `model.path` at a pinned revision. What a stage trains from that model carries the
same files, and only where each of them is the same byte for byte, and the configurations name the same classes of them,
the permission holds for it too. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ModelError
from rlhf_cli.files import hash_file
from rlhf_cli.models.hub import local_folder
from rlhf_cli.models.third_party import read_json

_CONFIGS = ("config.json", "tokenizer_config.json")
_ELSEWHERE = "--"
"""Stands between a repository and a class in `auto_map`, where the code is in another repository."""


def has_trusted_code(path: str, origin: str) -> bool:
    """Return whether a model folder carries code, and all of it is that of the model whose code the user allowed.

    Args:
        path: folder of the model, such as the output of an earlier stage.
        origin: folder or hub id of the model that the user allowed.
    """
    folder = Path(path)
    files = list(folder.rglob("*.py")) if folder.is_dir() else []
    if not files:
        return False
    allowed = local_folder(origin, with_weights=False)
    # By name and content, not by folder: the critic in a subfolder has the same files as its policy.
    known = {(file.name, hash_file(file)) for file in allowed.rglob("*.py")}
    classes, named = set(_named_classes(allowed)), set(_named_classes(folder))
    is_elsewhere = any(_ELSEWHERE in name for _, name in named)
    return not is_elsewhere and named <= classes and all((file.name, hash_file(file)) in known for file in files)


def check_own_repository(path: str) -> None:
    """Check that the code of a model whose code the user allows is in the model's own repository.

    Args:
        path: folder or hub id.

    Raises:
        ModelError: a configuration names code of another repository, which the pinned revision does not pin.
    """
    for config, name in _named_classes(local_folder(path, with_weights=False)):
        if _ELSEWHERE in name:
            repository, _, own = name.partition(_ELSEWHERE)
            raise ModelError(
                f"`{path}`: {config.split(':')[0]} names Python code of another repository (`{name}` in `auto_map`), "
                "for which `model.revision` names no commit",
                hint=f"copy the model to a folder, with the Python files of {repository} that you have read, and "
                f"write `{own}` in its `auto_map`",
            )


def _named_classes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the classes that the configurations of a model name in `auto_map`: `file:AutoClass` and `module.Class`."""
    for config in _CONFIGS:
        named: Any = read_json(folder / config).get("auto_map")
        if isinstance(named, list):  # of tokenizers, in old files
            named = {"AutoTokenizer": named}
        for auto, classes in named.items() if isinstance(named, dict) else ():
            for name in classes if isinstance(classes, list) else [classes]:
                if isinstance(name, str):
                    yield f"{config}:{auto}", name
