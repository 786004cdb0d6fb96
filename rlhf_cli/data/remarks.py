"""What deserves a warning: counted over a source, with the first place of each sort."""

from __future__ import annotations

from collections import Counter

_REMARKS = {
    "empty prompt": "an empty prompt",
    "sharegpt": "ShareGPT form (`from`, `value`), converted to `role`, `content`,",
    "after answer": "turns after the last answer, which are not used,",
    "answer dropped": "an answer at the end of the prompt, which is not used,",
    "common beginning": "no `prompt`, so that the common beginning of `chosen` and `rejected` is taken for it,",
    "equal answers": "the same answer more than once, which is shown once,",
    "best of n": "best of n (lists in `chosen` or `rejected`), read as two tiers,",
    "turn order": "an unusual order of turns, which the chat template has to allow,",
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
            f"{source}: {_REMARKS[what]} in {count:,} record{'s' if count > 1 else ''} (first: {self._first[what]})"
            for what, count in self._counts.items()
        ]
