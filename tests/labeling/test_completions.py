"""Sampled completions on disk: a kill at any byte loses at most a chunk, and the file ends the same."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_cli.errors import DiskError
from rlhf_cli.generation.generator import Completion
from rlhf_cli.labeling.completions import CompletionFile

CHUNKS = [[2, 0], [1, 4], [3]]


def sampler(log: list[int]):
    def sample(chunk):
        log.extend(chunk)
        return [Completion([number, k], f"à{number}\n{k}", k == 0) for number in chunk for k in range(2)]

    return sample


def whole(folder: Path) -> bytes:
    file = CompletionFile(folder / "whole.jsonl", CHUNKS, 2)
    file.fill(sampler([]))
    return (folder / "whole.jsonl").read_bytes()


def test_completions_come_back_in_the_order_of_the_prompts(tmp_path: Path):
    file = CompletionFile(tmp_path / "samples.jsonl", CHUNKS, 2)
    assert file.done == 0
    file.fill(sampler([]))
    assert file.done == 10
    assert [[completion.ids[0] for completion in group] for group in file.read()] == [[n, n] for n in range(5)]
    assert file.read()[3][1] == Completion([3, 1], "à3\n1", finished=False)


def test_log_probabilities_of_the_sampler_are_not_kept(tmp_path: Path):
    def sample(chunk):
        return [replace(one, logprobs=[-1.0, -2.0]) for one in sampler([])(chunk)]

    file = CompletionFile(tmp_path / "drawn.jsonl", CHUNKS, 2)
    file.fill(sample)
    assert (tmp_path / "drawn.jsonl").read_bytes() == whole(tmp_path)


def test_a_file_torn_at_any_byte_is_completed_to_the_same_bytes(tmp_path: Path):
    content = whole(tmp_path)
    path = tmp_path / "torn.jsonl"
    lines = content.split(b"\n")
    ends = [sum(len(line) + 1 for line in lines[: 2 * n]) for n in (2, 4, 5)]  # of each chunk
    for cut in range(0, len(content) + 1, 7):
        path.write_bytes(content[:cut])
        log: list[int] = []
        file = CompletionFile(path, CHUNKS, 2)
        kept = sum(end <= cut for end in ends)
        assert file.done == 2 * sum(len(chunk) for chunk in CHUNKS[:kept])
        file.fill(sampler(log))
        assert log == [number for chunk in CHUNKS[kept:] for number in chunk]
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    "chunks", [[[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]], [[2, 0, 1, 4, 3]], [[4, 0], [2, 1], [3]]]
)
@pytest.mark.parametrize(("lines", "left"), [(8, [3]), (6, [1, 3, 4]), (5, [1, 3, 4]), (2, [0, 1, 2, 3, 4])])
def test_other_chunks_keep_whole_chunks_of_before(chunks: list[list[int]], lines: int, left: list[int], tmp_path: Path):
    """Such as after a change of `batch_size`: a chunk that was not whole is sampled again, and nothing else."""
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"".join(whole(tmp_path).splitlines(keepends=True)[:lines]))
    log: list[int] = []
    file = CompletionFile(path, chunks, 2)
    assert file.done == 2 * (5 - len(left))
    file.fill(sampler(log))
    assert sorted(log) == left
    assert [[completion.ids for completion in group] for group in file.read()] == [[[n, 0], [n, 1]] for n in range(5)]
    assert CompletionFile(path, CHUNKS, 2).done == 10


@pytest.mark.parametrize(
    "damage", [b"garbage\n", b'{"prompt": 9, "ids": [], "text": "", "finished": true}\n', b"\x00\xff\n"]
)
def test_damage_is_cut_off_with_what_follows(damage: bytes, tmp_path: Path):
    content = whole(tmp_path)
    lines = content.splitlines(keepends=True)
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(b"".join([*lines[:4], damage, *lines[5:]]))
    file = CompletionFile(path, CHUNKS, 2)
    assert file.done == 4
    file.fill(sampler([]))
    assert path.read_bytes() == content


def test_every_flipped_bit_is_seen_and_repaired(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    content = whole(tmp_path)
    path = tmp_path / "flipped.jsonl"
    for bit in range(0, 8 * len(content), 5):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        file = CompletionFile(path, CHUNKS, 2)
        file.fill(sampler([]))
        assert path.read_bytes() == content
    assert f"bytes of {path} are torn or damaged" in capfd.readouterr().err.replace("\n", " ")


def test_what_follows_the_last_chunk_is_cut_off(tmp_path: Path):
    content = whole(tmp_path)
    path = tmp_path / "long.jsonl"
    path.write_bytes(content + b'{"prompt"')
    assert CompletionFile(path, CHUNKS, 2).done == 10
    assert path.read_bytes() == content


def test_prompts_in_no_chunk_stay_in_the_file_and_are_not_returned(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Such as those that a selection does not take."""
    content = whole(tmp_path)
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"".join(content.splitlines(keepends=True)[:8]))  # prompts 2, 0, 1 and 4
    log: list[int] = []
    file = CompletionFile(path, [[1, 3], [0]], 2, prompts=range(5))
    assert (file.done, file.left) == (4, 2)
    assert sorted(file.sampled()) == [0, 1]
    file.fill(sampler(log))
    assert log == [3]
    assert [group[0].ids[0] for group in file.read()] == [0, 1, 3]
    assert CompletionFile(path, CHUNKS, 2).done == 10
    assert "damaged" not in capsys.readouterr().err
    assert CompletionFile(path, CHUNKS, 2, prompts=range(2)).done == 0, "of another set of prompts"


def test_a_stop_while_a_chunk_is_sampled_keeps_those_before(tmp_path: Path):
    sampled: list[int] = []

    def sample(chunk):
        if len(sampled) == 4:
            raise KeyboardInterrupt
        return sampler(sampled)(chunk)

    path = tmp_path / "samples.jsonl"
    with pytest.raises(KeyboardInterrupt):
        CompletionFile(path, CHUNKS, 2).fill(sample)
    assert CompletionFile(path, CHUNKS, 2).done == 8


def test_a_full_disk_says_how_many_bytes_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = CompletionFile(tmp_path / "samples.jsonl", CHUNKS, 2)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match=r"cannot write \d+ bytes to .*samples\.jsonl: No space left"):
        file.fill(sampler([]))
