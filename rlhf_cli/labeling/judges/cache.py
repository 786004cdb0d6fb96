"""Cache of judges' replies on disk: no verdict is requested, or paid for, twice.

One JSON line per reply, with a checksum. A torn or damaged line is ignored, and its question is asked again. Files only
grow. Each process writes its own file, and the first process reads all of them. Paid attempts without a usable reply
are stored too, so that a resumed run knows what was spent.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_cli.errors import DiskError
from rlhf_cli.files import fsync
from rlhf_cli.labeling.judges.questions import Question
from rlhf_cli.labeling.judges.replies import UNHEARD, UNUSABLE, Reply
from rlhf_cli.progress import warn

_NAME = "verdicts"
FORMAT = 1
"""Version of how judges are asked and read, apart from the text of the question, which is part of the key: the
structure of a request, the beginning of a local judge's turn, and which tokens count as a letter. Raise it with any
change to these in `local.py` or `endpoint.py`: older verdicts are then requested again. Parsing of a stored text is not
part of it."""
_TIMES = 3
"""After this many paid but unusable replies a question counts as failed. More than one, since the cause may be a
temporary fault of a gateway; limited, since each is billed."""


def key_of(identity: str, question: Question) -> str:
    """Key of a reply.

    Args:
        identity: of the judge: everything its replies depend on apart from the question.
        question: asked of it.
    """
    text = f"{FORMAT}\0{identity}\0{question.instructions}\0{question.material}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class ReplyCache:
    """Replies by key.

    Args:
        folder: of the files; created if needed, and kept across runs of the stage.
        process: number of this process, which writes its own file; only process 0 reads the files.

    Attributes:
        spent: cost of everything in the files, including replies that are no longer needed.
        unheard: part of `spent` that went to attempts without a reply.
        attempts_unheard: number of these attempts.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        self._file = folder / (f"{_NAME}-{process}.jsonl" if process else f"{_NAME}.jsonl")
        self._replies: dict[str, Reply] = {}
        self._unusable: Counter[str] = Counter()
        self.spent, self.unheard, self.attempts_unheard = 0.0, 0.0, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in [] if process else [*folder.glob(f"{_NAME}.jsonl"), *sorted(folder.glob(f"{_NAME}-*.jsonl"))]:
                self._read(path)
        except OSError as error:
            raise _failed(folder, error) from error

    def _read(self, path: Path) -> None:
        damaged = 0
        with path.open("rb") as file:
            for line in file:
                found = _parsed(line)
                if found is None:
                    damaged += 1
                    continue
                self._remember(*found)
        if damaged:
            lines = "1 line is" if damaged == 1 else f"{damaged:,} lines are"
            warn(f"{path}: {lines} torn or damaged; these questions are asked again")

    def _remember(self, key: str, reply: Reply) -> None:
        self.spent += reply.cost
        if reply.failure == UNHEARD:
            self.unheard += reply.cost
            self.attempts_unheard += 1
        self._unusable[key] += reply.failure == UNUSABLE
        if reply.is_final or (reply.failure == UNUSABLE and self._unusable[key] >= _TIMES):
            self._replies[key] = reply

    def get(self, key: str) -> Reply | None:
        """The stored reply, if there is one."""
        return self._replies.get(key)

    def add(self, replies: Iterable[tuple[str, Reply]]) -> None:
        """Store replies; they are on disk when this returns.

        Raises:
            DiskError: they cannot be written; earlier replies are kept.
        """
        given = list(replies)
        lines = b"".join(_line(key, reply) for key, reply in given)
        try:
            with self._file.open("ab+") as file:
                if file.tell() and _last_byte(file) != b"\n":  # a kill tore the last line: end it
                    lines = b"\n" + lines
                file.write(lines)
                fsync(file)
        except OSError as error:
            raise _failed(self._file, error) from error
        for key, reply in given:
            self._remember(key, reply)


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _line(key: str, reply: Reply) -> bytes:
    plain = {"key": key, **reply.to_json()}
    return json.dumps(plain | {"crc32": _crc32(plain)}).encode() + b"\n"


def _parsed(line: bytes) -> tuple[str, Reply] | None:
    """Parse a line; None if it is damaged."""
    try:
        plain = json.loads(line)
        if plain.pop("crc32") != _crc32(plain):
            return None
        return plain.pop("key"), Reply.from_json(plain)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _crc32(plain: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def _failed(path: Path, error: OSError) -> DiskError:
    return DiskError(
        f"cannot write verdicts to {path}: {(error.strerror or str(error)).lower()}",
        hint="free disk space and run the same command again; earlier verdicts are kept",
    )
