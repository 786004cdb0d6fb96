"""Sampled completions on disk, appended in chunks: a kill loses one chunk, and the next run writes the same bytes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
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
        path: file of rank 0. What killed runs wrote is kept, whatever their chunks and their number of processes.
        chunks: numbers of the prompts in each chunk, in the order they are sampled; each prompt is in one chunk.
        per_prompt: completions per prompt (K).
        processes: of the run, which share the missing chunks.
        prompts: numbers of all prompts that there are. What an earlier attempt sampled for those in no chunk stays in
            the file, and is not returned. None: all are in chunks.
    """

    def __init__(
        self,
        path: Path,
        chunks: Sequence[Sequence[int]],
        per_prompt: int,
        processes: ProcessGroup | None = None,
        prompts: Collection[int] | None = None,
    ) -> None:
        self._folder, self._name, self._per_prompt = path.parent, path.stem, per_prompt
        self._processes = processes or ProcessGroup()
        self._numbers = {number for chunk in chunks for number in chunk}
        self._known = self._numbers if prompts is None else prompts
        done: list[int] | None = None
        if self._processes.is_main:  # it alone truncates files, before any process appends
            done = sorted(self._repair())
        self._done = self._numbers & set(self._processes.all_gather_object(done)[0])
        left = ([number for number in chunk if number not in self._done] for chunk in chunks)
        missing = [chunk for chunk in left if chunk]
        self._mine = self._processes.shard(missing)
        self._idle = -(-len(missing) // self._processes.count) - len(self._mine)

    @property
    def done(self) -> int:
        """Number of completions on disk."""
        return self._per_prompt * len(self._done)

    @property
    def total(self) -> int:
        """Number of completions of all chunks, of all processes."""
        return self._per_prompt * len(self._numbers)

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
        after_chunk: Callable[[Mapping[int, list[Completion]]], object] = lambda _: None,
    ) -> None:
        """Sample the missing chunks; each is on disk before the next begins. Returns when all processes are done.

        Args:
            sample: takes numbers of prompts; returns K completions per prompt, in the order of the prompts. All
                processes call it equally often, for those that share an engine: with no prompts where others have more
                chunks. May raise to stop: earlier chunks are kept.
            after_chunk: called with number -> K completions of a chunk of this process, once they are on disk.

        Raises:
            DiskError: the disk is full; earlier chunks are kept.
        """
        self._path(self._processes.index).touch()
        for chunk in self._mine:
            if chunk[0] not in self._done:
                after_chunk(self.add(chunk, sample(chunk)))
        for _ in range(self._idle):
            sample(())
        self._processes.barrier()
        self._done = set(self._numbers)

    def add(self, chunk: Sequence[int], completions: Sequence[Completion]) -> dict[int, list[Completion]]:
        """Append a chunk to the file of this process; returns number -> K completions once they are on disk.

        Raises:
            DiskError: see `fill`.
        """
        own, count = self._path(self._processes.index), self._per_prompt
        positions = [(number, len(chunk) - at) for at, number in enumerate(chunk, 1) for _ in range(count)]
        lines = b"".join(_line(*position, one) for position, one in zip(positions, completions, strict=True))
        try:
            append(own, lines)
        except OSError as error:
            raise DiskError(
                f"cannot write {len(lines):,} bytes to {own}: {error.strerror or error}",
                hint="free some space and run the same command again; completions sampled before are kept",
            ) from error
        self._done.update(chunk)
        return {number: list(completions[at * count : (at + 1) * count]) for at, number in enumerate(chunk)}

    def read(self) -> list[list[Completion]]:
        """Return K completions per prompt, in the order of the prompts; once `fill` has returned."""
        completions = self.sampled()
        return [completions[number] for number in sorted(completions)]

    def sampled(self) -> dict[int, list[Completion]]:
        """Return number -> K completions of each prompt of the chunks that is on disk."""
        completions: dict[int, list[Completion]] = {}
        for path in self._files():
            with path.open("rb") as file:
                for line in file:
                    found = _parse(line)
                    if found is None:
                        raise DataError(
                            f"{path} was damaged while it was in use", hint="run the same command again to repair it"
                        )
                    number, completion, _ = found
                    if number in self._numbers:
                        completions.setdefault(number, []).append(completion)
        return completions

    def _path(self, process: int) -> Path:
        return self._folder / (f"{self._name}-{process}.jsonl" if process else f"{self._name}.jsonl")

    def _files(self) -> list[Path]:
        return [*self._folder.glob(f"{self._name}.jsonl"), *sorted(self._folder.glob(f"{self._name}-*.jsonl"))]

    def _repair(self) -> set[int]:
        """Cut off what a kill left unfinished; returns the prompts whose completions are on disk."""
        done: set[int] = set()
        for file in self._files():
            numbers, size = self._scan(file)
            if (torn := file.stat().st_size - size) > 0:
                warn(f"the last {torn:,} bytes of {file} are torn or damaged: those completions are sampled again")
            with file.open("ab") as opened:
                opened.truncate(size)
            done |= numbers
        return done

    def _scan(self, path: Path) -> tuple[set[int], int]:
        """Return the prompts of all whole chunks in a file, and the bytes of these chunks.

        A kill can leave half a line or half a chunk, which is sampled again whole: its completions were computed
        together. Chunks may have other sizes than those of this run.
        """
        lines = path.read_bytes().split(b"\n")[:-1]
        done: set[int] = set()
        chunk: list[int] = []
        size = end = 0
        for start in range(0, len(lines), self._per_prompt):
            group = lines[start : start + self._per_prompt]
            found = {None if (one := _parse(line)) is None else (one[0], one[2]) for line in group}
            first = found.pop()
            if first is None or found or len(group) < self._per_prompt:
                break
            number, to_come = first
            if number not in self._known or number in done or number in chunk:
                break
            chunk.append(number)
            end += sum(len(line) + 1 for line in group)
            if to_come == 0:
                done.update(chunk)
                chunk, size = [], end
        return done, size


def _line(prompt: int, to_come: int, completion: Completion) -> bytes:
    """Return a line with a checksum: after a flipped bit in a text, the line would still be JSON.

    Args:
        prompt: its number.
        to_come: prompts of the same chunk that follow.
        completion: of the prompt.
    """
    plain = {"prompt": prompt, "to_come": to_come, **asdict(completion)}
    del plain["logprobs"]  # of use to PPO alone, which keeps no completions
    return json.dumps(plain | {"crc32": _crc32(plain)}, ensure_ascii=False).encode() + b"\n"


def _parse(line: bytes) -> tuple[int, Completion, int] | None:
    """Return prompt, completion and how many prompts of the chunk are to come; None if the line is torn or damaged."""
    try:
        plain = json.loads(line)
        if plain.pop("crc32") != _crc32(plain):
            return None
        prompt, to_come = plain.pop("prompt"), plain.pop("to_come", 0)  # earlier versions did not write it
        return prompt, Completion(**plain), to_come
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _crc32(plain: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())
