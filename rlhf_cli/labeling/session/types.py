"""Data exchanged between a labeling session and its interfaces, by shown positions; item order is never exposed."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rlhf_cli.data.records import Candidates, Prompt, prompt_to_json
from rlhf_cli.errors import EXIT_DATA, RLHFError

COMPLETION_LETTERS = "abcdeghijklmoprt"
"""Letters of the completions, in the order shown. `f`, `n`, `q`, `s` and `u` are keyboard commands."""
MARK_RANGE = (1, 5)
MAX_NOTE = 10_000
MAX_REASON = 500
MAX_NAME = 60


class LabelRefusedError(RLHFError):
    """The label is refused; nothing was stored."""

    exit_code = EXIT_DATA


class InvalidLabelError(LabelRefusedError):
    """The label is incomplete or invalid: a completion without a place, or a mark out of range."""


class LabelConflictError(LabelRefusedError):
    """The task has another label already, or the key was used for another label."""


class PlanChangedError(LabelRefusedError):
    """Guidelines, criteria or strengths differ from those displayed: display the new ones and ask again."""


class UnknownTaskError(LabelRefusedError):
    """The task does not exist, or belongs to another annotator."""


@dataclass(frozen=True)
class Entry:
    """What an annotator entered for one task; a draft may be incomplete.

    Attributes:
        tiers: shown positions, best first; a tier is a tie.
        strength: 1 to 4, how much better the better of two completions is; None for a tie, or if not asked for.
        marks: criterion -> (K,) marks from 1 to 5 by shown position.
        note: free text.
    """

    tiers: tuple[tuple[int, ...], ...] = ()
    strength: int | None = None
    marks: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> str:
        """Canonical JSON: equal entries give equal texts."""
        plain = asdict(self)
        plain["tiers"] = [sorted(tier) for tier in self.tiers]
        return json.dumps(plain, ensure_ascii=False, sort_keys=True)

    @staticmethod
    def of(plain: Any) -> Entry:
        """Parse untrusted JSON; raises `InvalidLabelError` if a type is wrong."""
        if not isinstance(plain, dict) or (unknown := sorted(set(plain) - {"tiers", "strength", "marks", "note"})):
            what = f"has the unknown field `{unknown[0]}`" if isinstance(plain, dict) else "must be a JSON object"
            raise InvalidLabelError(f"the label {what}", hint="its fields are tiers, strength, marks and note")
        tiers, marks = plain.get("tiers", []), plain.get("marks", {})
        strength, note = plain.get("strength"), plain.get("note", "")
        if not (isinstance(tiers, list) and all(isinstance(tier, list) and all(map(_whole, tier)) for tier in tiers)):
            raise InvalidLabelError("`tiers` must be a list of lists of positions", hint="such as [[2], [0, 1]]")
        if not (strength is None or _whole(strength)):
            raise InvalidLabelError("`strength` must be a whole number or null", hint="give 1 to 4, or null")
        if not (isinstance(marks, dict) and all(map(_marks, marks.values()))):
            raise InvalidLabelError("`marks` must be an object of lists of marks", hint='such as {"honest": [5, null]}')
        if not isinstance(note, str):
            raise InvalidLabelError("`note` must be a string", hint="give a string, or omit it")
        return Entry(
            tuple(tuple(sorted(tier)) for tier in tiers),
            strength,
            {str(name): tuple(values) for name, values in sorted(marks.items())},
            note,
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _marks(values: Any) -> bool:
    return isinstance(values, list) and all(value is None or _whole(value) for value in values)


def check_text(text: str, what: str, limit: int) -> None:
    """Raise `InvalidLabelError` for text that is too long or cannot be stored."""
    if len(text) > limit:
        raise InvalidLabelError(f"{what} has {len(text):,} characters", hint=f"at most {limit:,} are allowed")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidLabelError(f"{what} has an invalid character at {error.start}", hint="type it again") from error


@dataclass(frozen=True)
class Annotator:
    """A person who labels."""

    id: int
    name: str


@dataclass(frozen=True)
class LabelTask:
    """One item assigned to an annotator: a prompt and its completions, in the order shown to them.

    Attributes:
        id: of the assignment.
        number: how many tasks this annotator has received, including this one.
        prompt: text or messages.
        completions: K texts in shown order.
        draft: the entry so far, or the label that was undone; None if there is none.
        plan: `LabelPlan.display_hash` of the valid plan; if it differs from the one displayed, read
            `LabelSession.plan` again.
        active_seconds: spent on it so far.
        endings: K texts to show above the completions: that one was cut off; empty if it was not, or if that is not
            known.
    """

    id: int
    number: int
    prompt: Prompt
    completions: tuple[str, ...]
    plan: str
    draft: Entry | None = None
    active_seconds: float = 0.0
    endings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Receipt:
    """Confirms that a label is on disk.

    Attributes:
        action: id of its row.
        task: id of the labeled task.
        is_new: false if the same label had been stored before, for example after a lost reply.
    """

    action: int
    task: int
    is_new: bool


@dataclass(frozen=True)
class Growth:
    """How far the completions are that are being sampled while people label.

    Attributes:
        sampled: prompts whose completions are sampled, including those that are skipped because these are all equal.
        prompts: total.
    """

    sampled: int
    prompts: int

    @property
    def to_come(self) -> int:
        """Prompts whose completions are not sampled yet."""
        return self.prompts - self.sampled

    def __str__(self) -> str:
        return f"{self.sampled:,} of {self.prompts:,} prompts sampled"


@dataclass(frozen=True)
class SamplerStatus:
    """The state of what samples completions while people label.

    Attributes:
        is_running: returns whether it is at work.
        has_failed: set when it ended with an error; the interface then closes, and the error is shown.
    """

    is_running: Callable[[], bool]
    has_failed: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class SessionProgress:
    """Progress of the session, and of one annotator. Items to come count as items that are not done.

    Attributes:
        items: total.
        done: items with enough labels, or set aside.
        set_aside: items skipped or flagged too often.
        labels: rankings, without hidden repeats and gold.
        labels_left: rankings still needed.
        is_complete: the pipeline can continue.
        mine: tasks this annotator has finished, including skips, flags, hidden repeats and gold.
        left_for_me: tasks this annotator may still receive, including hidden repeats and gold.
        hidden: hidden repeats and gold in both of these.
        pace_seconds: median active time of this annotator's latest labels; None before the first.
        growth: how far sampling is; None if all items are there.
    """

    items: int
    done: int
    set_aside: int
    labels: int
    labels_left: int
    is_complete: bool
    mine: int = 0
    left_for_me: int = 0
    hidden: int = 0
    pace_seconds: float | None = None
    growth: Growth | None = None


@dataclass(frozen=True)
class AnnotatorOverview:
    """Work of one annotator so far, for the admin page.

    Attributes:
        name: of the annotator.
        labels: rankings, including hidden repeats and gold.
        skipped: tasks skipped.
        flagged: tasks flagged.
        active_seconds: total.
        median_seconds: per ranking; None before the first.
        last_at: time of the latest label, milliseconds since 1970; None before the first.
    """

    name: str
    labels: int
    skipped: int
    flagged: int
    active_seconds: float
    median_seconds: float | None
    last_at: int | None


def item_id(item: Candidates) -> str:
    """Hash of prompt and completions, in any order: an item keeps its labels across runs."""
    text = json.dumps([prompt_to_json(item.prompt), sorted(item.completions)], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]
