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
    "trees": "an OpenAssistant tree, whose ranked replies are taken,",
    "label studio": "a Label Studio task, whose annotations are taken,",
    "argilla": "an Argilla record, whose responses are taken,",
}
_LEFT_OUT = {
    "trees without": ("OpenAssistant tree", "without a message that has two ranked replies"),
    "replies not accepted": (
        "OpenAssistant message",
        "deleted, or not accepted by reviewers; with all that follows it",
    ),
    "replies without rank": ("OpenAssistant reply", "no `rank`, though siblings have one"),
    "tasks without": ("Label Studio task", "nobody ranked its answers"),
    "annotations not given": ("Label Studio annotation", "cancelled, or without a ranking"),
    "records without": ("Argilla record", "nobody ranked its answers"),
    "responses not submitted": ("Argilla response", "draft or discarded"),
    "labels not used": ("label", "skipped, flagged, a hidden repeat or a gold item"),
}
"""What is no record and so is not skipped either: its name, and why it is left out."""


class Remarks:
    """Things worth a warning, each with its count and the first place."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, what: str, place: str, detail: str = "", *, count: int = 1) -> None:
        """Count `count` more."""
        self._counts[what] += count
        self._first.setdefault(what, f"{place} {detail}".strip())

    def warnings(self, source: str) -> list[str]:
        """One line each."""
        return [f"{source}: {_line(what, count)} (first: {self._first[what]})" for what, count in self._counts.items()]


def _line(what: str, count: int) -> str:
    if what not in _LEFT_OUT:
        return f"{_REMARKS[what]} in {count:,} record{'s' if count > 1 else ''}"
    name, why = _LEFT_OUT[what]
    plural = name.removesuffix("y") + "ies" if name.endswith("y") else f"{name}s"
    return f"{count:,} {plural if count > 1 else name} left out: {why}"
