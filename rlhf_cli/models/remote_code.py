"""Models that come with their own Python code, which only `model.trust_remote_code` lets run.

The permission is for the code of `model.path` at a pinned revision. What a stage trains from that model carries the
same files, and only where each of them is the same byte for byte, the permission holds for it too. Imports no torch.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from rlhf_cli.files import hash_file
from rlhf_cli.models.hub import local_folder


@cache
def has_trusted_code(path: str, origin: str) -> bool:
    """Return whether a model folder carries code, and all of it is that of the model whose code the user allowed.

    Args:
        path: folder of the model, such as the output of an earlier stage.
        origin: folder or hub id of the model that the user allowed.
    """
    files = sorted(Path(path).glob("*.py")) if Path(path).is_dir() else []
    if not files:
        return False
    allowed = {file.name: hash_file(file) for file in local_folder(origin, with_weights=False).glob("*.py")}
    return all(allowed.get(file.name) == hash_file(file) for file in files)
