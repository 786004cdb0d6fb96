"""Sampled answers on disk: appended in chunks, so that a kill loses one and the next run writes the same bytes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError, DiskError
from rlhf_cli.files import append
from rlhf_cli.progress import warn


@dataclass(frozen=True)
class Answer:
    """One sampled answer.

    Attributes:
        prompt: number of its prompt.
        text: what the model said, possibly nothing.
        tokens: how many were sampled, the end token included.
        ended: the model ended it; otherwise it ran into the length limit.
    """

    prompt: int
    text: str
    tokens: int
    ended: bool


class Progress(Protocol):
    """Counts work done."""

    def advance(self, units: int = 1) -> None:
        """Count `units` more."""


class AnswerFile:
    """A growing `samples.jsonl`, one line an answer; of several processes each has its own (`samples-1.jsonl`, ...).

    Args:
        path: rank 0's file; what killed runs left, of any number of processes, is kept up to the last whole chunk.
        chunks: the numbers of the prompts in each chunk, in the order they are sampled; a prompt is in one of them.
        per_prompt: answers to each prompt (K).
        processes: those of the run, which share the chunks that are missing.
    """

    def __init__(
        self, path: Path, chunks: Sequence[Sequence[int]], per_prompt: int, processes: ProcessGroup | None = None
    ) -> None:
        self._folder, self._name, self._per_prompt = path.parent, path.stem, per_prompt
        self._processes = processes or ProcessGroup()
        self._chunks = {chunk[0]: chunk for chunk in chunks}
        done: list[int] | None = None
        if self._processes.is_main:  # it alone cuts files off, before any process writes on
            found = {file: self._scan(file) for file in self._files()}
            for file, (_, size) in found.items():
                if (torn := file.stat().st_size - size) > 0:
                    warn(f"the last {torn:,} bytes of {file} are torn or damaged: those answers are sampled again")
                with file.open("ab") as opened:
                    opened.truncate(size)
            done = [first for firsts, _ in found.values() for first in firsts]
        self._done = set(self._processes.all_gather_object(done)[0])
        missing = [chunk for first, chunk in self._chunks.items() if first not in self._done]
        self._mine = self._processes.shard(missing)

    @property
    def done(self) -> int:
        """Answers that are there already."""
        return self._per_prompt * sum(len(self._chunks[first]) for first in self._done)

    @property
    def left(self) -> int:
        """Answers that this process is to add."""
        return self._per_prompt * sum(len(chunk) for chunk in self._mine if chunk[0] not in self._done)

    def fill(self, sample: Callable[[Sequence[int]], list[Answer]], before_chunk: Callable[[], object]) -> None:
        """Sample the chunks that are missing; each is on disk before the next begins. Returns when all processes have.

        Args:
            sample: K answers to each of the prompts of these numbers.
            before_chunk: called when all so far is safe; may raise to stop.

        Raises:
            DiskError: the disk is full; the chunks before are kept.
        """
        own = self._path(self._processes.index)
        own.touch()
        for chunk in self._mine:
            before_chunk()
            answers = sample(chunk)
            lines = b"".join(_line(answer) for answer in answers)
            try:
                append(own, lines)
            except OSError as error:
                raise DiskError(
                    f"cannot write {len(lines):,} bytes to {own}: {error.strerror or error}",
                    hint="free some space and run the same command again; answers sampled before are kept",
                ) from error
        self._processes.barrier()
        self._done = set(self._chunks)

    def read(self) -> list[list[Answer]]:
        """All answers: one list of K a prompt, in the order of the prompts."""
        answers: dict[int, list[Answer]] = {}
        for path in self._files():
            with path.open("rb") as file:
                for line in file:
                    answer = _answer(line)
                    if answer is None:
                        raise DataError(
                            f"{path} was damaged while it was in use", hint="run the same command again to mend it"
                        )
                    answers.setdefault(answer.prompt, []).append(answer)
        return [answers[number] for number in sorted(answers)]

    def _path(self, process: int) -> Path:
        return self._folder / (f"{self._name}-{process}.jsonl" if process else f"{self._name}.jsonl")

    def _files(self) -> list[Path]:
        return [*self._folder.glob(f"{self._name}.jsonl"), *sorted(self._folder.glob(f"{self._name}-*.jsonl"))]

    def _scan(self, path: Path) -> tuple[list[int], int]:
        """Whole chunks of a file, by their first prompt, and the bytes they take. A kill can leave half a line."""
        lines = path.read_bytes().split(b"\n")[:-1]
        prompts = [None if (answer := _answer(line)) is None else answer.prompt for line in lines]
        done: list[int] = []
        size = place = 0
        while place < len(lines):
            first = prompts[place]
            chunk = () if first is None else self._chunks.get(first, ())
            expected = [number for number in chunk for _ in range(self._per_prompt)]
            if not expected or prompts[place : place + len(expected)] != expected:
                break
            done.append(expected[0])
            size += sum(len(line) + 1 for line in lines[place : place + len(expected)])
            place += len(expected)
        return done, size


def _line(answer: Answer) -> bytes:
    """An answer as a line that carries its own checksum: a flipped bit in a text would still be JSON."""
    plain = asdict(answer)
    return json.dumps(plain | {"crc32": _crc32(plain)}, ensure_ascii=False).encode() + b"\n"


def _answer(line: bytes) -> Answer | None:
    """The answer in a line that is as it was written; None for a torn or damaged one."""
    try:
        plain = json.loads(line)
        return Answer(**plain) if plain.pop("crc32") == _crc32(plain) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _crc32(plain: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())
