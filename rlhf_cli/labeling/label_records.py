"""One label, as exported and counted: what one annotator or judge said about the completions of one prompt.

`labels.jsonl` has one label per line, with fixed keys and in a fixed order: equal labels are equal bytes, and `git
diff` shows what changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from rlhf_cli.data.records import MARGINS, Message, Prompt, Ranking, prompt_to_json
from rlhf_cli.errors import DataError

Outcome = Literal["ranked", "skipped", "flagged"]
Purpose = Literal["label", "repeat", "gold"]
STRENGTHS = ("negligibly better or unsure", "slightly better", "better", "significantly better")
"""The four levels of Llama 2 (section 3.2.1), 1 to 4."""


_NO_MARKS: Mapping[str, tuple[int | None, ...]] = MappingProxyType({})


@dataclass(frozen=True)
class LabelRecord:
    """What one annotator said about one item.

    Attributes:
        item: id, a hash of prompt and completions.
        prompt: text or messages.
        completions: K completions, in the order of the item.
        annotator: name of the annotator or judge.
        outcome: whether there is a ranking.
        tiers: indices into `completions`, best first; empty unless ranked.
        shown: (K,) indices into `completions` in the order shown, from top to bottom or left to right.
        purpose: an ordinary label, a hidden repeat of an earlier item, or an item with a known order.
        known: the known order, for `gold`.
        strength: 1 to 4, see `STRENGTHS`; for two completions, if asked for.
        marks: criterion -> (K,) marks from 1 to 5, None where one is missing.
        note: free text.
        reason: why the item was skipped or flagged.
        active_seconds: time spent on it, without breaks; None if not measured.
        at: time of the label, UTC, ISO 8601 with milliseconds.
        guidelines: SHA-256 of the guidelines shown; None if there were none.
    """

    item: str
    prompt: Prompt
    completions: tuple[str, ...]
    annotator: str
    outcome: Outcome = "ranked"
    tiers: tuple[tuple[int, ...], ...] = ()
    shown: tuple[int, ...] = ()
    purpose: Purpose = "label"
    known: tuple[tuple[int, ...], ...] | None = None
    strength: int | None = None
    marks: Mapping[str, tuple[int | None, ...]] = field(default_factory=lambda: _NO_MARKS)
    note: str = ""
    reason: str = ""
    active_seconds: float | None = None
    at: str = ""
    guidelines: str | None = None

    def ranking(self) -> Ranking:
        """The ranking alone, as `train-rm` reads it; only for the outcome `ranked`."""
        margin = None if self.strength is None else MARGINS[self.strength - 1]
        return Ranking(self.prompt, self.completions, self.tiers, margin, self.annotator)


def to_json(label: LabelRecord) -> dict[str, Any]:
    """Convert to one object of `labels.jsonl`; every key is present."""
    return {
        "item": label.item,
        "prompt": prompt_to_json(label.prompt),
        "completions": list(label.completions),
        "annotator": label.annotator,
        "outcome": label.outcome,
        "ranking": [list(tier) for tier in label.tiers],
        "shown": list(label.shown),
        "purpose": label.purpose,
        "known": None if label.known is None else [list(tier) for tier in label.known],
        "strength": label.strength,
        "marks": {name: list(marks) for name, marks in sorted(label.marks.items())},
        "note": label.note,
        "reason": label.reason,
        "active_seconds": label.active_seconds,
        "at": label.at,
        "guidelines": label.guidelines,
    }


def write_labels(path: Path, labels: Iterable[LabelRecord]) -> None:
    """Write `labels.jsonl`."""
    with path.open("w", encoding="utf-8") as file:
        for label in labels:
            file.write(json.dumps(to_json(label), ensure_ascii=False) + "\n")


def read_labels(path: Path) -> Iterator[LabelRecord]:
    """Read `labels.jsonl`; raises `DataError` with `file:line` for an invalid line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield _from_json(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{path}:{number}: invalid label: {error}",
                    hint="expected the output of `rlhf label export --format labels`; a file that has only "
                    "`completions` and `ranking` holds rankings",
                ) from error


def _from_json(plain: dict[str, Any]) -> LabelRecord:
    """Parse one line; raises ValueError, KeyError or TypeError if it is invalid."""
    prompt = plain["prompt"]
    label = LabelRecord(
        item=plain["item"],
        prompt=prompt if isinstance(prompt, str) else tuple(Message(turn["role"], turn["content"]) for turn in prompt),
        completions=tuple(plain["completions"]),
        annotator=plain["annotator"],
        outcome=plain["outcome"],
        tiers=_tiers(plain["ranking"]),
        shown=tuple(plain["shown"]),
        purpose=plain["purpose"],
        known=None if plain["known"] is None else _tiers(plain["known"]),
        strength=plain["strength"],
        marks={name: tuple(marks) for name, marks in plain["marks"].items()},
        note=plain["note"],
        reason=plain["reason"],
        active_seconds=plain["active_seconds"],
        at=plain["at"],
        guidelines=plain["guidelines"],
    )
    _check(label)
    return label


_TEXTS = ("item", "annotator", "outcome", "purpose", "note", "reason", "at")


def _check(label: LabelRecord) -> None:
    for name in _TEXTS:
        if not isinstance(value := getattr(label, name), str):
            raise ValueError(f"`{name}` must be a string, got {value!r}")
    if not all(isinstance(text, str) for text in (*label.completions, label.guidelines or "")):
        raise ValueError("`completions` and `guidelines` must hold strings")
    if label.at:
        datetime.fromisoformat(label.at)
    seconds = label.active_seconds
    if seconds is not None and not (type(seconds) in (int, float) and 0.0 <= seconds < math.inf):
        raise ValueError(f"`active_seconds` must be a number of at least 0, got {seconds!r}")
    whole = [
        label.strength,
        *label.shown,
        *(index for tiers in (label.tiers, label.known or ()) for t in tiers for index in t),
    ]
    whole += [mark for marks in label.marks.values() for mark in marks]
    if not all(number is None or type(number) is int for number in whole):
        raise ValueError("positions, strengths and marks must be whole numbers")
    _check_sense(label, len(label.completions))


def _check_sense(label: LabelRecord, count: int) -> None:
    if label.outcome not in get_args(Outcome) or label.purpose not in get_args(Purpose):
        raise ValueError(f"`outcome` is {label.outcome!r} and `purpose` {label.purpose!r}")
    placed = sorted(index for tier in label.tiers for index in tier)
    if placed != (list(range(count)) if label.outcome == "ranked" else []):
        raise ValueError(f"`ranking` must hold each of the {count} completions once")
    if label.shown and sorted(label.shown) != list(range(count)):
        raise ValueError(f"`shown` must hold each of the {count} completions once")
    if label.known is not None and sorted(index for tier in label.known for index in tier) != list(range(count)):
        raise ValueError(f"`known` must hold each of the {count} completions once")
    if label.strength not in (None, *range(1, len(STRENGTHS) + 1)):
        raise ValueError(f"`strength` must be 1 to {len(STRENGTHS)}, got {label.strength!r}")
    for criterion, marks in label.marks.items():
        if len(marks) != count or not all(mark in (None, 1, 2, 3, 4, 5) for mark in marks):
            raise ValueError(f"`marks` of {criterion!r} must be {count} numbers from 1 to 5")


def _tiers(plain: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tier) for tier in plain)
