"""How rows are cut into passes, and that a pass without memory changes no result."""

from __future__ import annotations

import pytest
import torch

from rlhf_cli.training.micro_batches import MicroBatches

LENGTHS = [2, 3, 3, 5, 9]


def padded(rows) -> int:
    return len(rows) * max(LENGTHS[row] for row in rows)


def test_rows_are_cut_by_number_or_by_tokens():
    assert MicroBatches(2).cut(range(5), padded) == [[0, 1], [2, 3], [4]]
    assert MicroBatches(2, 10).cut(range(5), padded) == [[0, 1, 2], [3], [4]]
    assert MicroBatches(2, 1).cut(range(5), padded) == [[0], [1], [2], [3], [4]]
    assert MicroBatches(2, 1000).cut(range(5), padded) == [[0, 1, 2, 3, 4]]
    assert MicroBatches(2, 1000).cut(range(5), padded, most=3) == [[0, 1, 2], [3, 4]]
    assert MicroBatches(2).cut([], padded) == []


class Machine:
    """Adds up a gradient and has no memory for passes above `memory` tokens; a part of the failed pass is added."""

    def __init__(self, memory: int, error: Exception) -> None:
        self.memory, self.error, self.gradient, self.passes = memory, error, torch.zeros(5), []

    def work(self, cuts: MicroBatches, parts: list[list[int]]) -> int:
        for rows in cuts.own(parts, padded):
            self.passes.append(rows)
            if padded(rows) > self.memory:
                self.gradient[rows[0]] += 1.0
                raise self.error
            self.gradient[rows] += 1.0
        return len(self.passes)

    def clear(self) -> None:
        self.gradient.zero_()


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_pass_without_memory_is_repeated_in_smaller_ones(error, capsys):
    cuts, machine = MicroBatches(5, setting="ppo.micro_batch_tokens"), Machine(10, error)
    parts = cuts.cut(range(5), padded)
    cuts.run(lambda: machine.work(cuts, parts), machine.clear)
    assert machine.gradient.tolist() == [1.0] * 5
    # 45 tokens, then at most 22, then at most 11, which is 3 * 3 and no more.
    assert machine.passes == [[0, 1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 2], [3], [4]]
    assert "`ppo.micro_batch_tokens: 10`" in capsys.readouterr().err.replace("\n", " ")
    machine.passes.clear()
    cuts.run(lambda: machine.work(cuts, parts), machine.clear)
    assert machine.passes == [[0, 1, 2], [3], [4]], "the limit is remembered"


def test_one_row_without_memory_and_other_errors_are_raised():
    for machine in (Machine(4, MemoryError()), Machine(10, RuntimeError("shapes differ"))):
        cuts = MicroBatches(5)
        with pytest.raises(type(machine.error)):
            cuts.run(lambda cuts=cuts, machine=machine: machine.work(cuts, [[0, 1, 2, 3, 4]]), machine.clear)
