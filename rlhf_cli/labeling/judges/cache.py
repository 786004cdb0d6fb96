"""Replies that judges gave, on disk before they count: no verdict is asked for, or paid for, twice.

One JSON line a reply, with its own checksum. A line that a kill tore or a disk damaged is passed over, and what it
answered is asked again; all others stay. Files only ever grow. Of several processes each has its own, and the first
reads all. What was paid for and gave nothing stands there too, so that a run that goes on knows what was spent.
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
_FORM = 1
"""How a judge is asked and read beside the words of the question, which are in the key themselves: how the parts of a
request or of a local judge's text are put together, the words that begin its turn, which tokens say a letter and how
their probabilities are summed. Raise it with any change to these, in `local.py` or `endpoint.py`: verdicts that were
given another way are then asked for again. How a kept text is read for its mark is no part of it."""
_TIMES = 3
"""Unusable replies to one question that are paid for before it counts as answered, by a failure. Not one, since what
sent them may be a gateway that somebody mends; not any number, since each is billed."""


def key_of(identity: str, question: Question) -> str:
    """What a reply is known by.

    Args:
        identity: of the judge, everything its replies depend on beside the question.
        question: what it is asked.
    """
    text = f"{_FORM}\0{identity}\0{question.instructions}\0{question.material}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class ReplyCache:
    """Replies by key.

    Args:
        folder: of the files, made if need be; it outlives the run directory's stages.
        process: number of this process, whose file is written; only the first one reads what is there, of all.

    Attributes:
        spent: what all that is in the files cost, replies included that nobody asks for any more.
        unheard: how much of that went to attempts whose outcome nobody knows.
        attempts_unheard: how many those were.
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
            warn(f"{path}: {lines} torn or damaged and passed over: those questions are asked again")

    def _remember(self, key: str, reply: Reply) -> None:
        self.spent += reply.cost
        if reply.failure == UNHEARD:
            self.unheard += reply.cost
            self.attempts_unheard += 1
        self._unusable[key] += reply.failure == UNUSABLE
        if reply.is_final or (reply.failure == UNUSABLE and self._unusable[key] >= _TIMES):
            self._replies[key] = reply

    def get(self, key: str) -> Reply | None:
        """The reply that stands, if there is one."""
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
