"""The help: the guidelines of whoever leads the labeling, and what the keys do."""

from __future__ import annotations

from functools import lru_cache

from rlhf_cli.labeling.label_records import STRENGTHS
from rlhf_cli.labeling.session.types import LabelPlan
from rlhf_cli.labeling.terminal.wrapping import Piece, Row, wrap

_KEY_COLUMN = 18
_MAX_TEXT = 100
RANKING = (
    ("a b c …", "rank the answers from best to worst, in the order pressed"),
    ("=", "between two letters: a tie. b=a c means that b and a are equally good, and c is worse"),
    ("", "A letter pressed again moves to the end (after =, to the last place): to mend a ranking, type it again."),
    ("Backspace", "takes the last letter, or a waiting =, back"),
    ("Ctrl-U", "takes all letters back"),
    ("Enter", "submits the whole ranking, or says what lacks"),
)
STRENGTH = (
    ("1 2 3 4", "how much better the better answer is: " + ", ".join(f"{n} {s}" for n, s in enumerate(STRENGTHS, 1))),
)
MARKS = (
    ("1 2 3 4 5", "after the ranking: marks from worst to best, for one answer after the other"),
    (
        "Tab, arrows",
        "to another mark; a letter goes to that answer's marks; Backspace clears one; Esc: back to the ranking",
    ),
)
SKIP_FOR_ALL = (("s", "skip: leave it out; nobody else is asked"),)
SKIP_FOR_ONESELF = (("s", "skip: you leave it out; others may have it"),)
OTHERS = (
    ("u", "back: takes your last answer back and opens it again; u again goes further back"),
    ("f", "flag: something is wrong with this one; asks what"),
    ("n", "a note, in one line"),
    ("?", "guidelines and keys"),
    ("q, Ctrl-C", "quit; all that you entered is kept, and you go on where you stopped"),
)
READING = (
    ("up, down", "scroll by a line"),
    ("space, PageDown", "scroll by a page; PageUp back; Home and End to the ends"),
    ("left, right", "to the answer before, to the next one"),
)


@lru_cache(maxsize=4)
def guide_rows(plan: LabelPlan, width: int) -> tuple[Row, ...]:
    """Guidelines, then keys, in rows of at most `width` - 1 cells."""
    rows: list[Row] = []
    room = min(width - 2, _MAX_TEXT)
    if plan.guidelines is not None:
        rows += [*wrap(plan.guidelines.strip("\n"), room), (), (Piece("Keys", "accent"),)]
    keys = RANKING + (STRENGTH if plan.strengths else ()) + (MARKS if plan.criteria else ())
    skip = SKIP_FOR_ALL if plan.set_aside_after == 1 else SKIP_FOR_ONESELF
    for section in (keys, OTHERS[:1] + skip + OTHERS[1:], READING):
        for key, meaning in section:
            rows += _explained(key, meaning, room)
        rows.append(())
    return tuple(rows[:-1])


def _explained(key: str, meaning: str, room: int) -> list[Row]:
    first, *others = wrap(meaning, max(8, room - _KEY_COLUMN))
    return [(Piece(key.ljust(_KEY_COLUMN), "bold"), *first), *((Piece(" " * _KEY_COLUMN), *row) for row in others)]
