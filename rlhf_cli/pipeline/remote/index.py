"""The list of the files of a remote copy, and what a run directory knows of its remote copy.

URL/rlhf-remote.json       which files the copy consists of, and who wrote it; replaced as a whole
URL/ppo/model.safetensors  a file; one that replaces another has a part of its hash at the end of its name
runs/NAME/.remote.json     URL, run and writer by which a run directory recognizes its copy
"""

from __future__ import annotations

import json
import secrets
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

from rlhf_cli.errors import StorageError, UsageError
from rlhf_cli.files import write_whole
from rlhf_cli.pipeline.manifest import now
from rlhf_cli.storage import Storage, is_inside

INDEX = "rlhf-remote.json"
RECORD = ".remote.json"
FORMAT = 1


class RemoteFile(TypedDict):
    """A file of a copy; `key` is its name under the URL."""

    sha256: str
    bytes: int
    key: str


def new_id() -> str:
    """Return an identifier that nothing else has."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class Index:
    """The content of a remote copy: a run directory as it was at one moment.

    Attributes:
        run: identifier of the run.
        name: `name` of its recipe.
        writer: identifier of the command that writes to the copy.
        files: path in the run directory -> file.
        garbage: keys of files that are not part of the copy, and may be there: of an upload that was interrupted, or
            about to be deleted.
        host: machine of the writer.
        written: time in UTC, ISO 8601.
        format: version of this file.
    """

    run: str
    name: str
    writer: str
    files: dict[str, RemoteFile] = field(default_factory=dict)
    garbage: list[str] = field(default_factory=list)
    host: str = field(default_factory=socket.gethostname)
    written: str = field(default_factory=now)
    format: int = FORMAT

    def write(self, storage: Storage) -> None:
        """Replace the index of a copy."""
        storage.write(INDEX, json.dumps(asdict(self), indent=1, sort_keys=True).encode())


def read_index(storage: Storage) -> Index | None:
    """Return the index of a copy; None if there is no copy.

    Raises:
        StorageError: it cannot be read, or is damaged.
        UsageError: another version of rlhf wrote it.
    """
    if (content := storage.read(INDEX)) is None:
        return None
    try:
        plain = json.loads(content)
        if plain["format"] == FORMAT:
            found = Index(**plain)
            if all(is_inside(path) for path in found.files):
                return found
    except (ValueError, KeyError, TypeError):
        plain = {"format": FORMAT}
    if plain["format"] != FORMAT:
        raise UsageError(
            f"{storage.url} was written by another version of rlhf: its format is {plain['format']}, not {FORMAT}",
            hint="use that version, or another URL",
        )
    raise StorageError(f"{storage.url}/{INDEX} is damaged", hint="restore an earlier version of it, or use another URL")


@dataclass(frozen=True)
class Record:
    """What a run directory knows of its remote copy.

    Attributes:
        url: of the copy.
        run: identifier of the run.
        writer: identifier of the last command here that wrote to the copy.
        before: that of the one before it, of which this directory has everything.
        is_whole: False while the files of the copy are being put in place.
    """

    url: str
    run: str
    writer: str
    before: str | None = None
    is_whole: bool = True

    def write(self, folder: Path) -> None:
        """Write it to a run directory."""
        write_whole(folder / RECORD, json.dumps(asdict(self)))


def read_record(folder: Path) -> Record | None:
    """Return the record in a run directory; None without one that can be read."""
    try:
        return Record(**json.loads((folder / RECORD).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
