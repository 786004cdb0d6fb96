"""Key bindings: a state and a key give a new state, and sometimes an effect for the session.

This module uses no terminal, clock or store. The letters typed are the ranking:

- A letter ranks its completion after the last one; after `=` it ties with the last one (`b=a c` is b = a > c).
- A letter typed again moves its completion to the end. So typing a whole ranking gives that ranking, whatever was there
  before. Repeating the letter typed last does nothing.
- Backspace removes the last letter (or a waiting `=`).
"""

from __future__ import annotations

from dataclasses import replace

from rlhf_cli.labeling.label_records import STRENGTHS
from rlhf_cli.labeling.session.types import COMPLETION_LETTERS, MAX_NOTE, MAX_REASON, InvalidLabelError
from rlhf_cli.labeling.terminal.editing import Line
from rlhf_cli.labeling.terminal.keys import Key
from rlhf_cli.labeling.terminal.marking import in_marks, marked_with, to_marks
from rlhf_cli.labeling.terminal.state import Effect, ScrollArea, State, Tiers, hinted, unknown, warned


def step(state: State, key: Key, scroll_area: ScrollArea) -> tuple[State, Effect | None]:
    """Handle a key; returns the new state and an effect.

    Args:
        state: its `top` or `help_top` may be outside `scroll_area` after the window was resized.
        key: pressed key.
        scroll_area: of the current view.
    """
    state = replace(state, hint="", hint_style="dim")
    if key.name == "control" and key.text in "czl":
        return state, Effect({"c": "quit", "z": "suspend", "l": "redraw"}[key.text])  # type: ignore[arg-type]
    if state.view == "failure":
        return _in_failure(state, key)
    if state.view == "help":
        return _in_help(state, key, scroll_area), None
    if state.view in ("note", "flag"):
        return _in_line(state, key, scroll_area)
    if (moved := _scrolled(state, key, scroll_area)) is not None:
        return moved, None
    letter = key.text.lower() if key.name == "text" else ""
    if letter and letter in "qsfun?":
        return _command(state, letter)
    if state.view == "end":
        if key.name == "enter" and state.is_waiting:  # pressed once more after the last label
            return hinted(state, "the next task appears by itself; q quits"), None
        return (state, Effect("quit")) if key.name == "enter" else (unknown(state, key), None)
    if key.name == "enter":
        return _entered(state)
    if state.view == "marks":
        return in_marks(state, key, letter, scroll_area), None
    return _in_rank(state, key, letter, scroll_area), None


def _command(state: State, letter: str) -> tuple[State, Effect | None]:
    if letter == "?":
        return replace(state, view="help", before=state.view, help_top=0), None
    if letter in "qu":
        return state, Effect("quit" if letter == "q" else "undo")
    if state.view == "end":
        return hinted(state, f"`{letter}` needs an open task"), None
    if letter == "s":
        return state, Effect("skip")
    line = Line.of(state.note) if letter == "n" else Line()
    return replace(state, view="note" if letter == "n" else "flag", before=state.view, line=line), None


# Ranking


def _in_rank(state: State, key: Key, letter: str, scroll_area: ScrollArea) -> State:
    if key.name == "backspace":
        return _taken_back(state)
    if key.name == "control" and key.text == "u":
        return hinted(_with_tiers(state, ()), "started over")
    if key.name in ("left", "right"):
        return replace(state, top=_next_stop(state, scroll_area, +1 if key.name == "right" else -1))
    if key.name == "tab" and state.plan.criteria:
        return to_marks(state, scroll_area)
    if letter == "=":
        return _equals(state)
    if letter and letter in COMPLETION_LETTERS:
        return _placed(state, letter)
    if letter.isdecimal() and letter.isascii():
        return _digit(state, int(letter), scroll_area)
    return unknown(state, key)


def _placed(state: State, letter: str) -> State:
    position = COMPLETION_LETTERS.index(letter)
    if position >= state.count:
        return hinted(state, f"there is no answer {letter}")
    if state.tiers and position == state.tiers[-1][-1]:
        return replace(hinted(state, f"{letter} is already the last one"), is_joining=False)
    others = tuple(tuple(p for p in tier if p != position) for tier in state.tiers)
    others = tuple(tier for tier in others if tier)
    if state.is_joining and others:
        return _with_tiers(state, (*others[:-1], (*others[-1], position)))
    return _with_tiers(state, (*others, (position,)))


def _equals(state: State) -> State:
    if not state.tiers:
        return hinted(state, "= goes between two letters: type the first one, then =, then the second one")
    return replace(state, is_joining=True)


def _taken_back(state: State) -> State:
    if state.is_joining:
        return replace(state, is_joining=False)
    if not state.tiers:
        return hinted(state, "nothing is ranked yet; u undoes your last label")
    last = state.tiers[-1][:-1]
    return _with_tiers(state, (*state.tiers[:-1], last) if last else state.tiers[:-1])


def _with_tiers(state: State, tiers: Tiers) -> State:
    """Set the ranking; a changed ranking loses its strength."""
    strength = state.strength if tiers == state.tiers else None
    return replace(state, tiers=tiers, is_joining=False, strength=strength)


def _digit(state: State, digit: int, scroll_area: ScrollArea) -> State:
    if state.unplaced:
        return hinted(state, "rank first; digits come afterwards" if _takes_digits(state) else _NO_DIGITS)
    if state.asks_strength:
        if 1 <= digit <= len(STRENGTHS):
            given = replace(state, strength=digit)
            return to_marks(given, scroll_area) if given.empty_cell is not None else given
        return hinted(state, f"how much better: 1 to {len(STRENGTHS)}")
    if state.plan.criteria:
        return marked_with(to_marks(state, scroll_area), digit, scroll_area)
    return hinted(state, "in a tie, no answer is better: no digit is needed" if _takes_digits(state) else _NO_DIGITS)


_NO_DIGITS = "digits have no meaning here: letters rank, best first"


def _takes_digits(state: State) -> bool:
    return bool(state.plan.criteria) or (state.plan.strengths and state.count == 2)


def _entered(state: State) -> tuple[State, Effect | None]:
    if state.is_joining:
        return warned(state, "= needs a second letter; Backspace removes it"), None
    entry = state.entry
    if not state.unplaced and not (state.asks_strength and state.strength is None) and state.empty_cell is not None:
        position, criterion = cell = state.empty_cell
        lacks = f"answer {COMPLETION_LETTERS[position]} needs a mark for `{state.plan.criteria[criterion]}`: 1 to 5"
        return warned(replace(state, view="marks", cell=cell), lacks), None
    try:
        state.plan.check(entry, state.count)
    except InvalidLabelError as error:
        return warned(state, f"{error.message}: {error.hint}" if error.hint else error.message), None
    return state, Effect("submit", entry)


# Lines of text


def _in_line(state: State, key: Key, scroll_area: ScrollArea) -> tuple[State, Effect | None]:
    is_note = state.view == "note"
    if key.name == "escape":
        return replace(state, view=state.before, line=Line()), None
    if key.name == "enter":
        text = state.line.text.strip()
        if is_note:
            kept = replace(state, view=state.before, note=text, line=Line())
            return replace(kept, hint="note saved" if text else "no note", hint_style="dim"), None
        if not text:
            return warned(state, "a flag needs a reason; Esc cancels"), None
        return replace(state, view=state.before, line=Line()), Effect("flag", reason=text)
    if key.name in ("pageup", "pagedown", "up", "down"):
        return _scrolled(state, key, scroll_area) or state, None
    limit = MAX_NOTE if is_note else MAX_REASON
    line = state.line.pressed(key, limit)
    if line is None:
        return unknown(state, key), None
    changed = replace(state, line=line)
    typed = key.name in ("text", "paste")
    return (warned(changed, f"at most {limit:,} characters") if typed and len(line.text) >= limit else changed), None


# Help and failure


def _in_help(state: State, key: Key, scroll_area: ScrollArea) -> State:
    if key.name in ("escape", "enter") or (key.name == "text" and key.text.lower() in "?q"):
        return replace(state, view=state.before)
    moved = _scrolled(replace(state, top=state.help_top), key, scroll_area)
    if moved is None:
        return hinted(state, "Enter continues with the answers")
    return replace(moved, top=state.top, help_top=moved.top)


def _in_failure(state: State, key: Key) -> tuple[State, Effect | None]:
    assert state.failure is not None
    if key.name == "enter":
        return replace(state, view=state.before), state.failure.effect
    if key.name == "text" and key.text.lower() == "q":
        return state, Effect("leave" if state.failure.effect.kind == "quit" else "quit")
    if key.name == "escape" and state.task is not None:
        return replace(state, view=state.before, failure=None), None
    return state, None


# Scrolling


def _scrolled(state: State, key: Key, scroll_area: ScrollArea) -> State | None:
    """Scroll; returns None for a key that does not scroll."""
    top, page = min(state.top, scroll_area.last), max(1, scroll_area.page - 2)
    is_space = key.name == "text" and key.text == " "
    if state.view == "marks" and key.name in ("up", "down"):
        return None
    moves = {
        "up": top - 1,
        "down": top + 1,
        "pageup": top - page,
        "pagedown": top + page,
        "home": 0,
        "end": scroll_area.last,
    }
    if not is_space and key.name not in moves:
        return None
    requested = top + page if is_space else moves[key.name]
    return replace(state, top=max(0, min(requested, scroll_area.last)))


def _next_stop(state: State, scroll_area: ScrollArea, by: int) -> int:
    """First row of the next or previous completion."""
    top = min(state.top, scroll_area.last)
    if by > 0:
        return min(next((stop for stop in scroll_area.stops if stop > top), scroll_area.last), scroll_area.last)
    return next((stop for stop in reversed(scroll_area.stops) if stop < top), 0)
