"""Warnings about a source: one line per kind, with a count and the first location."""

from __future__ import annotations

from collections import Counter

from rlhf_cli.data.readers.rows import printable

_RECORD_WARNINGS = {
    "form": "read as {subject},",
    "windows": "text in Windows-1252 (western languages; check its accents), converted to UTF-8,",
    "prompt column": "no `prompt`: `{subject}` is used as the prompt,",
    "column not read": "`{subject}`, which is not read,",
    "empty prompt": "an empty prompt",
    "sharegpt": "ShareGPT format (`from`, `value`), converted to `role`, `content`,",
    "after completion": "turns after the last completion, which are ignored,",
    "turns not trained": "earlier turns with `weight: 0`, which are read and not trained,",
    "completion dropped": "a completion at the end of the prompt, which is ignored,",
    "common beginning": "no `prompt`: the common beginning of `chosen` and `rejected` is used as the prompt,",
    "equal completions": "the same completion more than once, which is shown once,",
    "best of n": "best of n (lists in `chosen` or `rejected`), read as two tiers,",
    "turn order": "an unusual order of turns, which the chat template must allow,",
    "trees": "an OpenAssistant tree, whose ranked replies are read,",
    "label studio": "a Label Studio task, whose annotations are read,",
    "argilla": "an Argilla record, whose responses are read,",
    "prodigy": "a Prodigy choice task, whose accepted options are above the others,",
}
"""Kind -> what a record has: "<text> in 2 records"."""
_SKIP_WARNINGS = {
    "trees without": ("OpenAssistant tree", "no message with two ranked replies"),
    "replies not accepted": ("OpenAssistant message", "deleted or not accepted by reviewers; its replies too"),
    "replies without rank": ("OpenAssistant reply", "no `rank`, though its siblings have one"),
    "tasks without": ("Label Studio task", "no ranking of its completions"),
    "annotations not given": ("Label Studio annotation", "canceled or without a ranking"),
    "records without": ("Argilla record", "no ranking of its completions"),
    "responses not submitted": ("Argilla response", "draft or discarded"),
    "label false": ("demonstration", "marked as bad by its `label`"),
    "weight 0": ("demonstration", "no assistant turn is to be trained (`weight: 0`)"),
    "not accepted": ("record", "not accepted by its annotator"),
    "no verdict": ("comparison", "no verdict"),
    "not compared": ("rated completion", "no other completion of the same prompt is rated better or worse"),
    "not placed": ("completion", "left unranked; the others of its task are ranked"),
    "labels not used": ("label", "skipped, flagged, a hidden repeat or a gold item"),
}
"""Kind -> name and reason of what is skipped although it is not a record: "2 <names> skipped: <reason>"."""
_SOURCE_WARNINGS = {
    "contradictions": (
        "{count} pair{s} of completions ranked both ways (a > b and b > a) for the same prompt; all rankings are kept"
    ),
    "annotator repeats": (
        "{count} record{s} by an annotator who ranked the same completions again later; the latest is used"
    ),
    "candidate repeats": "{count} record{s} with the prompt and completions of an earlier record; each is used once",
}
"""Kind -> a sentence about the source as a whole."""


class WarningLog:
    """Counts warnings by kind and remembers the first location of each."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], str] = {}

    def add(self, kind: str, location: str = "", detail: str = "", *, count: int = 1, subject: str = "") -> None:
        """Count a warning.

        Args:
            kind: a key of the tables above.
            location: `file:line`; empty for warnings about the source as a whole.
            detail: text that is shown after the location.
            count: how many to add; 0 adds nothing.
            subject: what the warning is about, such as a column; those about other subjects are counted apart.
        """
        if count:
            self._counts[kind, subject] += count
            self._first.setdefault((kind, subject), f"{location} {detail}".strip())

    def lines(self, source: str) -> list[str]:
        """One line per kind, in the order in which the kinds first came."""
        return [
            f"{source}: {_line(*key, count)}" + (f" (first: {first})" if (first := self._first[key]) else "")
            for key, count in self._counts.items()
        ]


def _line(kind: str, subject: str, count: int) -> str:
    plural = "s" if count > 1 else ""
    if kind in _SOURCE_WARNINGS:
        return _SOURCE_WARNINGS[kind].format(count=f"{count:,}", s=plural)
    if kind in _RECORD_WARNINGS:
        return f"{_RECORD_WARNINGS[kind].format(subject=printable(subject))} in {count:,} record{plural}"
    name, reason = _SKIP_WARNINGS[kind]
    names = name if count == 1 else name.removesuffix("y") + "ies" if name.endswith("y") else f"{name}s"
    return f"{count:,} {names} skipped: {reason}"
