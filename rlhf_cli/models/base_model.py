"""The base model of a saved adapter: where it is, and whether it still is the one that the adapter was trained on.

An adapter is only meaningful on the weights it was trained on. Its folder names them by path or hub id and by the
sha256 of their files. Hashing reads every byte, which takes one to two seconds for a gigabyte, once per file, in the
main process alone. A check of headers or samples alone would miss weights that differ in few places.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from rlhf_cli.distributed.ranks import is_main
from rlhf_cli.errors import ModelError
from rlhf_cli.files import hash_file
from rlhf_cli.models.peft_folder import find_peft_folder


def hash_weights(path: str) -> str | None:
    """sha256 over names and contents of the weight files of a model folder; None if there is no such folder.

    A PEFT adapter is hashed with its base, if that is a folder too.
    """
    if not Path(path).is_dir():
        return None
    total = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")):
        total.update(f"{file.name}\0{hash_file(file)}\n".encode())
    if (adapter := find_peft_folder(path)) is not None:
        total.update(f"base\0{hash_weights(adapter.base) or adapter.base}\n".encode())
    return total.hexdigest()


def locate_base(base: str, file: Path) -> str:
    """Return the path or hub id from which a base can be loaded.

    Args:
        base: a path relative to the folder of `file`, an absolute path, or a hub id.
        file: the file that names it, for messages.

    Raises:
        ModelError: the base is a path, and no folder is there.
    """
    found = file.parent / base
    if found.is_dir():
        return str(found.resolve())
    if Path(base).is_absolute() or base.startswith("."):
        raise ModelError(
            f"{file} names the base model `{base}`, which is not there: looked for {found.resolve()}",
            hint=f"put the base model there, or set `base` in {file} to where it is; a run directory can be moved as "
            "a whole",
        )
    return base


def check_base(path: str, sha256: str | None, file: Path) -> None:
    """Check, in the main process, that a base is the one that an adapter was trained on; the others rely on it.

    Args:
        path: folder or hub id of the base; on the hub, the revision identifies it.
        sha256: of its weight files at that time, see `hash_weights`; None if it was not recorded.
        file: the file that names the base, for messages.

    Raises:
        ModelError: its weights are others.
    """
    if sha256 is None or not is_main() or (found := hash_weights(path)) is None or found == sha256:
        return
    raise ModelError(
        f"{file.parent} was trained on other weights than those that are now in {path} (sha256 {sha256[:12]} then, "
        f"{found[:12]} now)",
        hint=f"restore the model that it was trained on, name that in {file}, or train on the new one again",
    )
