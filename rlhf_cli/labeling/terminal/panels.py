"""Header and footer: progress, ranking, strength, marks, input line, hints and keys."""

from __future__ import annotations

from rlhf_cli.durations import format_duration
from rlhf_cli.labeling.label_records import STRENGTHS
from rlhf_cli.labeling.session.types import COMPLETION_LETTERS, SessionProgress
from rlhf_cli.labeling.terminal.state import State
from rlhf_cli.labeling.terminal.visible import clusters
from rlhf_cli.labeling.terminal.wrapping import Piece, Row, cut, flow, width_of, wrap

_BAR = 24
_LABEL = 10
_NAMES = 16


def header(state: State, width: int) -> Row:
    """Progress, pace and remaining time on the left; the annotator's name on the right."""
    progress = state.progress
    total = progress.mine + progress.left_for_me
    number = min(progress.mine + 1, total) if state.task is not None else progress.mine
    filled = round(_BAR * progress.mine / total) if total else _BAR
    left = [
        Piece(f" {number:,} of {max(total, number):,}  ", "bold"),
        Piece("█" * filled, "accent"),
        Piece("─" * (_BAR - filled), "dim"),
        Piece(f"  {pace(progress)}", "dim"),
    ]
    used = sum(width_of(piece.text) for piece in left)
    if used > width:
        left = [left[0], Piece(cut(pace(progress), width - width_of(left[0].text)), "dim")]
        used = sum(width_of(piece.text) for piece in left)
    name = cut(state.name, max(0, width - used - 3))
    return (*left, Piece(name, "dim", width - width_of(name) - 1)) if len(name) > 1 else tuple(left)


def pace(progress: SessionProgress) -> str:
    """Seconds per label and the remaining time; empty before the first label."""
    if progress.pace_seconds is None:
        return ""
    each = f"{progress.pace_seconds:.0f} s each" if progress.pace_seconds >= 1 else "under 1 s each"
    seconds = progress.pace_seconds * progress.left_for_me
    return f"{each}, about {roughly(seconds)} left" if progress.left_for_me else each


def roughly(seconds: float) -> str:
    """An approximate duration: a minute, 7 min, 2 h 10 min."""
    if seconds < 60:
        return "a minute"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else format_duration(minutes * 60)


def sampling_note(state: State) -> str:
    """How far the completions are that are being sampled; empty if all are there."""
    growth = state.progress.growth
    if growth is None:
        return ""
    return str(growth) if state.is_sampling else f"sampling stopped at {growth.sampled:,} of {growth.prompts:,}"


def ending_rows(state: State, width: int) -> list[Row]:
    """Rows shown without a task."""
    if state.view == "failure":
        return []
    progress = state.progress
    if state.is_waiting:
        say = "All that is ready is labeled. The next task appears here by itself."
    elif progress.growth is not None:
        say = "All that is ready is labeled, and nothing samples the other completions."
    elif progress.left_for_me > 0:
        say = f"Nothing for you right now: others are working on the rest ({progress.left_for_me:,}). Come back later."
    elif progress.labels_left:
        say = "You have labeled everything assigned to you. Others are still working."
    else:
        say = "Labeling is complete. Thank you."
    rows: list[Row] = [(), *((Piece("  "), *row) for row in wrap(say, width - 4, "bold")), ()]
    last = "Enter quits. u undoes your last label, if you want to change it."
    if state.is_waiting:
        last = f"{progress.growth}. q quits, u undoes your last label."
    return rows + [(Piece("  "), *row) for row in wrap(last, width - 4)]


def footer(state: State, width: int, space: int) -> tuple[list[Row], tuple[int, int] | None]:
    """Rows below the completions, and the cursor in them while a line is being typed.

    Args:
        state: to show.
        width: of the screen.
        room: maximum number of rows; less important ones are dropped first.
    """
    parts: dict[str, list[Row]] = {}
    column = 0
    if state.task is not None:
        parts["ranking"] = _ranking(state, width)
        if state.asks_strength:
            parts["strength"] = _strength(state, width)
        if state.plan.criteria and state.view != "marks":
            parts["marks in short"] = [_marks_in_short(state, width)]
        if state.view in ("note", "flag"):
            row, column = _typed(state, width)
            parts["typed"] = [row]
        elif state.note:
            parts["note"] = [(Piece(" note".ljust(_LABEL), "dim"), Piece(cut(state.note, width - _LABEL - 1)))]
        if state.view == "marks":
            parts["marks"] = _marks(state, width, max(2, min(9, space - 6)))
    if state.view == "failure":
        parts["hint"] = _failure(state, width)
    else:
        parts["hint"] = [(Piece(cut(f" {state.hint or _what_next(state)}", width), state.hint_style),)]
    parts["keys"] = [_keys(state, width)]
    for name in ("note", "marks in short", "strength", "ranking"):
        if sum(map(len, parts.values())) > space:
            parts.pop(name, None)
    rows = [row for part in parts.values() for row in part]
    typed = parts.get("typed")
    return rows, None if typed is None else (next(n for n, row in enumerate(rows) if row is typed[0]), column)


def _ranking(state: State, width: int) -> list[Row]:
    parts: list[Piece] = []
    last = len(state.tiers) - 1
    for number, tier in enumerate(state.tiers):
        names = " = ".join(COMPLETION_LETTERS[completion] for completion in tier)
        parts.append(Piece(names + (" = _" if number == last and state.is_joining else ""), "bold"))
    rows = list(flow(parts, width - _LABEL - 1, " > ")) if parts else [(Piece("none yet", "dim"),)]
    rows = [(Piece((" ranking" if n == 0 else "").ljust(_LABEL), "dim"), *row) for n, row in enumerate(rows)]
    if state.tiers and state.unplaced:
        missing = "to place: " + " ".join(COMPLETION_LETTERS[completion] for completion in state.unplaced)
        used = sum(width_of(piece.text) for piece in rows[-1])
        if used + 4 + len(missing) <= width:
            rows[-1] = (*rows[-1], Piece(f"    {missing}", "warn"))
        else:
            rows.append((Piece(" " * _LABEL), Piece(cut(missing, width - _LABEL), "warn")))
    return rows


def _strength(state: State, width: int) -> list[Row]:
    better = COMPLETION_LETTERS[state.tiers[0][0]]
    choices = [
        Piece(f" {number} {words} ", "chosen" if state.strength == number else "plain")
        for number, words in enumerate(STRENGTHS, 1)
    ]
    rows = flow(choices, width - _LABEL, "")
    return [(Piece((f" {better} is" if n == 0 else "").ljust(_LABEL - 1)), *row) for n, row in enumerate(rows)]


def _marks(state: State, width: int, most: int) -> list[Row]:
    """Table of criteria and completions; scrolls to the current cell."""
    criteria = state.plan.criteria
    space = min(most, len(criteria))
    chosen, first = state.cell[1], 0
    first = max(0, min(chosen - space // 2, len(criteria) - space))
    wide = max(3, min(5, (width - _NAMES - 2) // state.count))
    rows: list[Row] = [
        (
            Piece(" marks".ljust(_NAMES + 1), "dim"),
            *(
                Piece(COMPLETION_LETTERS[n].center(wide), "bold" if n == state.cell[0] else "dim")
                for n in range(state.count)
            ),
        )
    ]
    for criterion in range(first, first + space):
        name = cut(criteria[criterion], _NAMES - 1).ljust(_NAMES)
        cells = []
        for completion in range(state.count):
            mark = state.marks[completion][criterion]
            here = (completion, criterion) == state.cell
            text = "·" if mark is None else str(mark)
            cells.append(Piece((f"[{text}]" if here else text).center(wide), "bold" if here else "plain"))
        rows.append((Piece(" " + name, "bold" if criterion == chosen else "plain"), *cells))
    return rows


def _marks_in_short(state: State, width: int) -> Row:
    given = sum(mark is not None for marks in state.marks for mark in marks)
    asked = state.count * len(state.plan.criteria)
    names = ", ".join(state.plan.criteria)
    return (
        Piece(" marks".ljust(_LABEL), "dim"),
        Piece(cut(f"{given} of {asked} ({names}); Tab opens them", width - _LABEL), "dim"),
    )


def _typed(state: State, width: int) -> tuple[Row, int]:
    """The input line around its cursor, and the column of the cursor."""
    label = " note".ljust(_LABEL) if state.view == "note" else " why?".ljust(_LABEL)
    space = max(8, width - _LABEL - 2)
    before = list(clusters(state.line.text[: state.line.cursor]))
    used = 0
    start = len(before)
    while start > 0 and used + before[start - 1].width <= space * 3 // 4:
        start -= 1
        used += before[start].width
    sign = "…" if start > 0 else " "
    shown = "".join(part.text for part in before[start:])
    after = cut(state.line.text[state.line.cursor :], space - used) if used < space else ""
    return (Piece(label, "accent"), Piece(sign, "dim"), Piece(shown), Piece(after)), _LABEL + 1 + used


def _failure(state: State, width: int) -> list[Row]:
    assert state.failure is not None
    say = state.failure.message + (f" ({state.failure.hint})" if state.failure.hint else "")
    rows = [(Piece(" "), *row) for row in wrap(say, width - 2, "error")[:4]]
    kept = "what you entered is still here" if state.task is not None else "nothing was lost"
    return [*rows, (Piece(cut(f" {kept}", width), "dim"),)]


def _what_next(state: State) -> str:
    """Default hint: what to do next."""
    if state.view == "end":
        return "waiting for completions" if state.is_waiting else "no task is open"
    if state.view == "note":
        return "Enter saves the note, Esc discards changes"
    if state.view == "flag":
        return "what is wrong? Enter sends the flag, Esc cancels"
    if state.view == "marks":
        completion, criterion = state.cell
        name = state.plan.criteria[criterion]
        if state.empty_cell is None:
            return "all marks are set: Enter submits"
        return f"how {name} is answer {COMPLETION_LETTERS[completion]}? 1 (worst) to 5 (best)"
    if state.is_joining:
        last = COMPLETION_LETTERS[state.tiers[-1][-1]]
        return f"which answer is as good as {last}?"
    if not state.tiers:
        return "which answer is best? press its letter"
    if state.unplaced:
        return "which is next? = first if it ties with the last one"
    if state.asks_strength and state.strength is None:
        return "how much better? 1 to 4"
    if state.empty_cell is not None:
        return "now the marks: 1 (worst) to 5 (best)"
    return "Enter submits"


def _keys(state: State, width: int) -> Row:
    """The keys of the current view; the least important ones are dropped if there is no room."""
    letters = COMPLETION_LETTERS[: state.count]
    span = f"{letters[:1]}-{letters[-1:]}" if letters == "abcdefgh"[: len(letters)] else letters
    last: tuple[tuple[str, str], ...] = (("?", "help"), ("q", "quit"))
    if state.view == "failure":
        quits = "quit without it" if state.failure is not None and state.failure.effect.kind == "quit" else "quit"
        keys = (("Enter", "try again"), *((("Esc", "back"),) if state.task is not None else ()), ("q", quits))
        last = ()
    elif state.view == "end":
        keys = (*(() if state.is_waiting else (("Enter", "quit"),)), ("u", "undo"))
    elif state.view in ("note", "flag"):
        keys, last = (("Enter", "done"), ("Esc", "cancel"), ("Ctrl-C", "quit")), ()
    elif state.view == "marks":
        keys = (("1-5", "mark"), ("Tab", "next"), ("Backspace", "clear"), ("Enter", "submit"), ("Esc", "ranking"))
    else:
        keys = ((span, "rank"), ("=", "tie"), ("Enter", "submit"), *_OTHERS)
    space = width - 1
    while keys and _size((*keys, *last)) > space:
        keys = keys[:-1]
    row = [Piece(" ")]
    for number, (key, meaning) in enumerate((*keys, *last)):
        row += [Piece("  " * bool(number)), Piece(key, "bold"), Piece(f" {meaning}", "dim")]
    return tuple(row)


_OTHERS = (("u", "undo"), ("s", "skip"), ("f", "flag"), ("n", "note"), ("Backspace", "remove"))


def _size(keys: tuple[tuple[str, str], ...]) -> int:
    return sum(len(key) + len(meaning) + 3 for key, meaning in keys) - 2
