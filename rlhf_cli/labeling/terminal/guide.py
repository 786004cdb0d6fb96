"""The help screen: guidelines and keys."""

from __future__ import annotations

from functools import lru_cache

from rlhf_cli.labeling.label_records import STRENGTHS
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.terminal.wrapping import Piece, Row, wrap

_KEY_COLUMN = 18
_MAX_TEXT = 100
RANKING = (
    ("a b c …", "rank the answers from best to worst, in the order typed"),
    ("=", "between two letters: a tie. b=a c means that b and a are equally good, and c is worse"),
    ("", "A letter typed again moves to the end (after =, to the last place). To fix a ranking, type it again."),
    ("Backspace", "removes the last letter, or a waiting ="),
    ("Ctrl-U", "removes all letters"),
    ("Enter", "submits the whole ranking, or says what is missing"),
)
STRENGTH = (
    ("1 2 3 4", "how much better the better answer is: " + ", ".join(f"{n} {s}" for n, s in enumerate(STRENGTHS, 1))),
)
MARKS = (
    ("1 2 3 4 5", "after the ranking: marks from worst to best, answer by answer"),
    (
        "Tab, arrows",
        "select another mark; a letter selects that answer's marks; Backspace clears one; Esc returns to the ranking",
    ),
)
SKIP_FOR_ALL = (("s", "skip; nobody else gets this task"),)
SKIP_FOR_ONESELF = (("s", "skip; others may still get this task"),)
OTHERS = (
    ("u", "undo your last label and open its task again; u again goes further back"),
    ("f", "flag a problem with this task; asks for the reason"),
    ("n", "add a note, in one line"),
    ("?", "guidelines and keys"),
    ("q, Ctrl-C", "quit; your entries are saved, and you can resume later"),
)
READING = (
    ("up, down", "scroll by a line"),
    ("space, PageDown", "scroll by a page; PageUp back; Home and End to the ends"),
    ("left, right", "previous and next answer"),
    ("(cut off ...)", "after an answer: the model had not ended it when it reached the token limit"),
)


@lru_cache(maxsize=4)
def guide_rows(plan: LabelPlan, width: int) -> tuple[Row, ...]:
    """Guidelines, then keys, in rows of at most `width` - 1 cells."""
    rows: list[Row] = []
    space = min(width - 2, _MAX_TEXT)
    if plan.guidelines is not None:
        rows += [*wrap(plan.guidelines.strip("\n"), space), (), (Piece("Keys", "accent"),)]
    keys = RANKING + (STRENGTH if plan.strengths else ()) + (MARKS if plan.criteria else ())
    skip = SKIP_FOR_ALL if plan.set_aside_after == 1 else SKIP_FOR_ONESELF
    for section in (keys, OTHERS[:1] + skip + OTHERS[1:], READING):
        for key, meaning in section:
            rows += _explained(key, meaning, space)
        rows.append(())
    return tuple(rows[:-1])


def _explained(key: str, meaning: str, space: int) -> list[Row]:
    first, *others = wrap(meaning, max(8, space - _KEY_COLUMN))
    return [(Piece(key.ljust(_KEY_COLUMN), "bold"), *first), *((Piece(" " * _KEY_COLUMN), *row) for row in others)]
