"""Sampled answers on disk: appended in chunks, so that a kill loses one and the next run writes the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from rlhf_cli.errors import DiskError


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
    """A growing `samples.jsonl`, one line an answer.

    Args:
        path: the file; what a killed run left of it is kept, up to the last whole chunk.
        chunks: the numbers of the prompts in each chunk, in the order they are sampled.
        per_prompt: answers to each prompt (K).
    """

    def __init__(self, path: Path, chunks: Sequence[Sequence[int]], per_prompt: int) -> None:
        self._path, self._chunks, self._per_prompt = path, chunks, per_prompt
        self._done, size = self._whole_chunks()
        with path.open("ab") as file:
            file.truncate(size)

    @property
    def done(self) -> int:
        """Answers that are there already."""
        return self._per_prompt * sum(len(chunk) for chunk in self._chunks[: self._done])

    def fill(self, sample: Callable[[Sequence[int]], list[Answer]], before_chunk: Callable[[], object]) -> None:
        """Sample the chunks that are missing; each is on disk before the next begins.

        Args:
            sample: K answers to each of the prompts of these numbers.
            before_chunk: called when all so far is safe; may raise to stop.

        Raises:
            DiskError: the disk is full; the chunks before are kept.
        """
        for chunk in self._chunks[self._done :]:
            before_chunk()
            answers = sample(chunk)
            lines = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers).encode()
            try:
                with self._path.open("ab") as file:
                    file.write(lines)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise DiskError(
                    f"cannot write {len(lines):,} bytes to {self._path}: {error.strerror or error}",
                    hint="free some space and run the same command again; answers sampled before are kept",
                ) from error
        self._done = len(self._chunks)

    def read(self) -> list[list[Answer]]:
        """All answers: one list of K a prompt, in the order of the prompts."""
        answers: dict[int, list[Answer]] = {}
        for answer in self._lines():
            answers.setdefault(answer.prompt, []).append(answer)
        return [answers[number] for number in sorted(answers)]

    def _lines(self) -> Iterator[Answer]:
        with self._path.open(encoding="utf-8") as file:
            for line in file:
                yield Answer(**json.loads(line))

    def _whole_chunks(self) -> tuple[int, int]:
        """Chunks that are whole on disk, and the bytes they take. A kill, or a dying disk, can leave half a line."""
        if not self._path.exists():
            return 0, 0
        lines = self._path.read_bytes().split(b"\n")[:-1]
        done = size = first = 0
        for chunk in self._chunks:
            expected = [number for number in chunk for _ in range(self._per_prompt)]
            written = lines[first : first + len(expected)]
            if [_prompt_of(line) for line in written] != expected:
                break
            done, first = done + 1, first + len(expected)
            size += sum(len(line) + 1 for line in written)
        return done, size


def _prompt_of(line: bytes) -> int | None:
    """The prompt's number in a whole line; None for a torn one."""
    try:
        return Answer(**json.loads(line)).prompt
    except (ValueError, TypeError):
        return None
