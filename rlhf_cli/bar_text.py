"""What a progress bar says at its end, and less of it where there is less room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.cells import cell_len

_BETWEEN = " \u00b7 "
_NOTES = "  "
_FIRST_NOTES = 2
"""Parts of a note that matter more than the time left in a unit."""


@dataclass(frozen=True)
class BarText:
    """The parts of the text at the end of a bar.

    Attributes:
        doing: what is being done.
        amount: how much of it is done.
        ends: when the running unit ends.
        rate: how fast.
        note: what was measured, the most important first, with two spaces between measures.
    """

    doing: str = ""
    amount: str = ""
    ends: str = ""
    rate: str = ""
    note: str = ""

    def __str__(self) -> str:
        doing = " ".join(part for part in (self.doing, self.amount) if part)
        return _BETWEEN.join(part for part in (doing, self.ends, self.rate, self.note) if part)

    def fitted(self, width: int) -> str:
        """Return as many parts as fit into a width, each of them whole; where not one fits, the text is wider."""
        shorter = list(self._ever_shorter())
        return str(next((one for one in shorter if cell_len(str(one)) <= width), shorter[-1]))

    def _ever_shorter(self) -> Iterator[BarText]:
        """Yield the text without one part after another, the least important first."""
        measures = self.note.split(_NOTES)
        short = replace(self, rate="", amount="")
        yield from (self, replace(self, rate=""))
        for count in range(len(measures), _FIRST_NOTES - 1, -1):
            yield replace(short, note=_NOTES.join(measures[:count]))
        for count in range(_FIRST_NOTES, -1, -1):
            yield replace(short, ends="", note=_NOTES.join(measures[:count]))
