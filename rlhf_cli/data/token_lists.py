"""Token ids in four bytes each. A list takes about 36: eight for the slot, 28 for the number. Imports no torch."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

INT32 = "i"
"""Type of token ids in an `array`: 32 bits."""


class TokenLists(Sequence[list[int]]):
    """N lists of token ids in one array; a list is made when it is read.

    Args:
        lists: the lists, which are copied one by one.
    """

    __slots__ = ("_ends", "_ids")

    def __init__(self, lists: Iterable[Sequence[int]] = ()) -> None:
        self._ids, self._ends = array(INT32), array("q", [0])
        for ids in lists:
            self.append(ids)

    def append(self, ids: Sequence[int]) -> None:
        """Add a list at the end."""
        self._ids.extend(ids)
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...

    @overload
    def __getitem__(self, index: slice) -> TokenLists: ...

    def __getitem__(self, index: int | slice) -> list[int] | TokenLists:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return TokenLists(self[number] for number in numbers)
        return self._ids[self._ends[numbers] : self._ends[numbers + 1]].tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  (it can grow)

    def __repr__(self) -> str:
        return f"TokenLists({len(self):,} lists, {len(self._ids):,} tokens)"
