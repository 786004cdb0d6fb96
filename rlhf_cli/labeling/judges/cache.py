"""Replies that judges gave, on disk before they count: nothing is asked, or paid for, twice.

One JSON line a reply, with its own checksum. A line that a kill tore or a disk damaged is passed over, and what it
answered is asked again; all others stay. Files only ever grow. Of several processes each has its own and reads all.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_cli.errors import DiskError
from rlhf_cli.labeling.judges.questions import Question
from rlhf_cli.labeling.judges.replies import Reply
from rlhf_cli.progress import warn

_NAME = "verdicts"


def key_of(identity: str, question: Question) -> str:
    """What a reply is known by.

    Args:
        identity: of the judge, everything its replies depend on beside the question.
        question: what it is asked.
    """
    text = f"{identity}\0{question.instructions}\0{question.material}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class ReplyCache:
    """Replies by key.

    Args:
        folder: of the files, made if need be; it outlives the run directory's stages.
        process: number of this process, whose file is written; only the first one reads what is there, of all.

    Attributes:
        spent: what all replies in the files cost, those included that nobody asks for any more.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        self._file = folder / (f"{_NAME}-{process}.jsonl" if process else f"{_NAME}.jsonl")
        self._replies: dict[str, Reply] = {}
        self.spent = 0.0
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
                key, reply = found
                self.spent += reply.cost
                self._replies[key] = reply
        if damaged:
            lines = "1 line is" if damaged == 1 else f"{damaged:,} lines are"
            warn(f"{path}: {lines} torn or damaged and passed over: those questions are asked again")

    def get(self, key: str) -> Reply | None:
        """The reply, if there is one."""
        return self._replies.get(key)

    def add(self, replies: Iterable[tuple[str, Reply]]) -> None:
        """Keep replies; they are on the disk when this returns.

        Raises:
            DiskError: they cannot be written; those before are kept.
        """
        given = list(replies)
        lines = b"".join(_line(key, reply) for key, reply in given)
        try:
            with self._file.open("ab+") as file:
                if file.tell() and _last_byte(file) != b"\n":  # a kill tore the last line: it stays alone
                    lines = b"\n" + lines
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _failed(self._file, error) from error
        self.spent += sum(reply.cost for _, reply in given)
        self._replies.update(given)


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _line(key: str, reply: Reply) -> bytes:
    plain = {"key": key, **reply.to_json()}
    return json.dumps(plain | {"crc32": _crc32(plain)}).encode() + b"\n"


def _parsed(line: bytes) -> tuple[str, Reply] | None:
    """What a line says, if it is as it was written."""
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
        f"cannot keep verdicts in {path}: {(error.strerror or str(error)).lower()}",
        hint="free some space and run the same command again; verdicts before are kept",
    )
