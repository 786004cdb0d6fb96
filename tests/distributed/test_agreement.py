"""An error of one process ends all of them with the same message."""

from __future__ import annotations

import pytest

from rlhf_cli.distributed.agreement import agreed, by_main
from rlhf_cli.errors import DataError, DiskError, DivergedError, HostMemoryError, ModelError


class Rank:
    """A process of a run of two; the other one says `other`."""

    count = 2

    def __init__(self, index: int, other: object = None) -> None:
        self.index, self.is_main, self.other, self.said = index, index == 0, other, []

    def all_gather_object(self, item: object) -> list[object]:
        self.said.append(item)
        return [item, self.other] if self.is_main else [self.other, item]


def failing(error: Exception):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize("kind", [DiskError, DivergedError, HostMemoryError, ModelError])
def test_the_other_process_raises_what_the_first_raised(kind: type):
    first = Rank(0)
    with pytest.raises(kind, match="no space") as caught:
        agreed(failing(kind("no space", hint="free some")), first)
    other = Rank(1, first.said[0])
    with pytest.raises(kind, match="no space") as told:
        agreed(lambda: None, other)
    assert (told.value.message, told.value.hint) == (caught.value.message, caught.value.hint)


def test_without_an_error_all_wait_for_each_other_and_go_on():
    done, ranks = [], [Rank(0), Rank(1)]
    for rank in ranks:
        by_main(lambda: done.append("main"), rank)
    assert done == ["main"]
    assert all(rank.said == [None] for rank in ranks)
    agreed(lambda: done.append("alone"), None)
    assert done == ["main", "alone"]


def test_errors_of_other_kinds_are_raised_at_once():
    rank = Rank(0)
    with pytest.raises(DataError):
        agreed(failing(DataError("bad record")), rank)
    assert rank.said == []
