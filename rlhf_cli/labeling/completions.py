"""Sampled completions on disk, appended in chunks: a kill loses one chunk, and the next run writes the same bytes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError, DiskError
from rlhf_cli.files import append
from rlhf_cli.generation.generator import Completion
from rlhf_cli.progress import warn


class CompletionFile:
    """A growing `samples.jsonl`, one line per completion. Each process has its own file (`samples-1.jsonl`, ...).

    Args:
        path: file of rank 0. Whole chunks that killed runs wrote are kept, whatever their number of processes.
        chunks: numbers of the prompts in each chunk, in the order they are sampled; each prompt is in one chunk.
        per_prompt: completions per prompt (K).
        processes: of the run, which share the missing chunks.
    """

    def __init__(
        self, path: Path, chunks: Sequence[Sequence[int]], per_prompt: int, processes: ProcessGroup | None = None
    ) -> None:
        self._folder, self._name, self._per_prompt = path.parent, path.stem, per_prompt
        self._processes = processes or ProcessGroup()
        self._chunks = {chunk[0]: chunk for chunk in chunks}
        done: list[int] | None = None
        if self._processes.is_main:  # it alone truncates files, before any process appends
            found = {file: self._scan(file) for file in self._files()}
            for file, (_, size) in found.items():
                if (torn := file.stat().st_size - size) > 0:
                    warn(f"the last {torn:,} bytes of {file} are torn or damaged: those completions are sampled again")
                with file.open("ab") as opened:
                    opened.truncate(size)
            done = [first for firsts, _ in found.values() for first in firsts]
        self._done = set(self._processes.all_gather_object(done)[0])
        missing = [chunk for first, chunk in self._chunks.items() if first not in self._done]
        self._mine = self._processes.shard(missing)

    @property
    def done(self) -> int:
        """Number of completions on disk."""
        return self._per_prompt * sum(len(self._chunks[first]) for first in self._done)

    @property
    def left(self) -> int:
        """Number of completions that this process has to add."""
        return self._per_prompt * sum(len(chunk) for chunk in self._mine if chunk[0] not in self._done)

    @property
    def next_chunk(self) -> Sequence[int]:
        """Numbers of the prompts that this process samples next; none if nothing is left for it."""
        return next((chunk for chunk in self._mine if chunk[0] not in self._done), ())

    def fill(
        self,
        sample: Callable[[Sequence[int]], list[Completion]],
        before_chunk: Callable[[], object],
        after_chunk: Callable[[Mapping[int, list[Completion]]], object] = lambda _: None,
    ) -> None:
        """Sample the missing chunks; each is on disk before the next begins. Returns when all processes are done.

        Args:
            sample: takes numbers of prompts; returns K completions per prompt, in the order of the prompts.
            before_chunk: called when everything so far is on disk; may raise to stop.
            after_chunk: called with number -> K completions of a chunk of this process, once they are on disk.

        Raises:
            DiskError: the disk is full; earlier chunks are kept.
        """
        self._path(self._processes.index).touch()
        for chunk in self._mine:
            if chunk[0] not in self._done:
                before_chunk()
                after_chunk(self.add(chunk, sample(chunk)))
        self._processes.barrier()
        self._done = set(self._chunks)

    def add(self, chunk: Sequence[int], completions: Sequence[Completion]) -> dict[int, list[Completion]]:
        """Append a chunk to the file of this process; returns number -> K completions once they are on disk.

        Raises:
            DiskError: see `fill`.
        """
        own, count = self._path(self._processes.index), self._per_prompt
        numbers = [number for number in chunk for _ in range(count)]
        lines = b"".join(_line(number, one) for number, one in zip(numbers, completions, strict=True))
        try:
            append(own, lines)
        except OSError as error:
            raise DiskError(
                f"cannot write {len(lines):,} bytes to {own}: {error.strerror or error}",
                hint="free some space and run the same command again; completions sampled before are kept",
            ) from error
        self._done.add(chunk[0])
        return {number: list(completions[at * count : (at + 1) * count]) for at, number in enumerate(chunk)}

    def read(self) -> list[list[Completion]]:
        """Return K completions per prompt, in the order of the prompts; once `fill` has returned."""
        completions = self.sampled()
        return [completions[number] for number in sorted(completions)]

    def sampled(self) -> dict[int, list[Completion]]:
        """Return number -> K completions of each prompt that is on disk."""
        completions: dict[int, list[Completion]] = {}
        for path in self._files():
            with path.open("rb") as file:
                for line in file:
                    found = _parse(line)
                    if found is None:
                        raise DataError(
                            f"{path} was damaged while it was in use", hint="run the same command again to repair it"
                        )
                    number, completion = found
                    completions.setdefault(number, []).append(completion)
        return completions

    def _path(self, process: int) -> Path:
        return self._folder / (f"{self._name}-{process}.jsonl" if process else f"{self._name}.jsonl")

    def _files(self) -> list[Path]:
        return [*self._folder.glob(f"{self._name}.jsonl"), *sorted(self._folder.glob(f"{self._name}-*.jsonl"))]

    def _scan(self, path: Path) -> tuple[list[int], int]:
        """Return the first prompt of each whole chunk in a file, and the bytes of these chunks.

        A kill can leave half a line or half a chunk.
        """
        lines = path.read_bytes().split(b"\n")[:-1]
        prompts = [None if (found := _parse(line)) is None else found[0] for line in lines]
        done: list[int] = []
        size = position = 0
        while position < len(lines):
            first = prompts[position]
            chunk = () if first is None else self._chunks.get(first, ())
            expected = [number for number in chunk for _ in range(self._per_prompt)]
            if not expected or prompts[position : position + len(expected)] != expected:
                break
            done.append(expected[0])
            size += sum(len(line) + 1 for line in lines[position : position + len(expected)])
            position += len(expected)
        return done, size


def _line(prompt: int, completion: Completion) -> bytes:
    """Return a line with a checksum: after a flipped bit in a text, the line would still be JSON."""
    plain = {"prompt": prompt, **asdict(completion)}
    del plain["logprobs"]  # of use to PPO alone, which keeps no completions
    return json.dumps(plain | {"crc32": _crc32(plain)}, ensure_ascii=False).encode() + b"\n"


def _parse(line: bytes) -> tuple[int, Completion] | None:
    """Return the number of the prompt and the completion in a line; None if the line is torn or damaged."""
    try:
        plain = json.loads(line)
        if plain.pop("crc32") != _crc32(plain):
            return None
        return plain.pop("prompt"), Completion(**plain)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _crc32(plain: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())
