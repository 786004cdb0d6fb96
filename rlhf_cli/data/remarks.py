"""What deserves a warning: counted over a source, with the first place of each sort."""

from __future__ import annotations

from collections import Counter

_REMARKS = {
    "empty prompt": "have an empty prompt",
    "sharegpt": "were in ShareGPT form (`from`, `value`) and were converted to `role`, `content`",
    "after answer": "go on after the last assistant turn; what follows it is not used",
    "answer dropped": "end with an answer, which is no part of a prompt and is not used",
    "common beginning": "have no `prompt`; the common beginning of `chosen` and `rejected` was taken for it",
    "turn order": "have an unusual order of turns, which the chat template has to allow",
}


class Remarks:
    """Things worth a warning, each with its count and the first place."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, what: str, place: str, detail: str = "") -> None:
        """Count one more."""
        self._counts[what] += 1
        self._first.setdefault(what, f"{place} {detail}".strip())

    def warnings(self, source: str) -> list[str]:
        """One line each."""
        return [
            f"{source}: {count:,} record{'s' if count > 1 else ''} {_REMARKS[what]} (first: {self._first[what]})"
            for what, count in self._counts.items()
        ]
