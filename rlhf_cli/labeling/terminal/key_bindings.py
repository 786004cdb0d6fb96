"""What every key does: a state and a key make a new state, and sometimes something for the session to do.

No terminal, no clock and no store are here; the letters typed are the ranking:

- A letter puts its answer behind the last one; after `=` it shares the last one's place (`b=a c` is b = a > c).
- The latest press of a letter counts: an answer that has a place already leaves it. So typing a whole ranking gives
  that ranking, whatever was there before. The letter that was pressed last does nothing when pressed again.
- Backspace takes the last letter (or a waiting `=`) back.
"""

from __future__ import annotations

from dataclasses import replace

from rlhf_cli.labeling.label_records import STRENGTHS
from rlhf_cli.labeling.session.types import ANSWER_LETTERS, MAX_NOTE, MAX_REASON, InvalidLabelError
from rlhf_cli.labeling.terminal.editing import Line
from rlhf_cli.labeling.terminal.keys import Key
from rlhf_cli.labeling.terminal.marking import in_marks, marked_with, to_marks
from rlhf_cli.labeling.terminal.scrolling import next_stop, scrolled
from rlhf_cli.labeling.terminal.state import Effect, Extent, State, Tiers, hinted, unknown, warned


def step(state: State, key: Key, extent: Extent) -> tuple[State, Effect | None]:
    """The state after a key, and what is to be done.

    Args:
        state: before it; its `top` (or `help_top`) may lie outside of `extent` after a change of size.
        key: pressed.
        extent: of what scrolls in this view.
    """
    state = replace(state, hint="", hint_style="dim")
    if key.name == "control" and key.text in "czl":
        return state, Effect({"c": "quit", "z": "suspend", "l": "redraw"}[key.text])  # type: ignore[arg-type]
    if state.view == "trouble":
        return _in_trouble(state, key)
    if state.view == "help":
        return _in_help(state, key, extent), None
    if state.view in ("note", "flag"):
        return _in_line(state, key, extent)
    if (moved := scrolled(state, key, extent)) is not None:
        return moved, None
    letter = key.text.lower() if key.name == "text" else ""
    if letter and letter in "qsfun?":
        return _command(state, letter)
    if state.view == "end":
        return (state, Effect("quit")) if key.name == "enter" else (unknown(state, key), None)
    if key.name == "enter":
        return _entered(state)
    if state.view == "marks":
        return in_marks(state, key, letter, extent), None
    return _in_rank(state, key, letter, extent), None


def _command(state: State, letter: str) -> tuple[State, Effect | None]:
    if letter == "?":
        return replace(state, view="help", before=state.view, help_top=0), None
    if letter in "qu":
        return state, Effect("quit" if letter == "q" else "undo")
    if state.view == "end":
        return hinted(state, f"no task is open for `{letter}`"), None
    if letter == "s":
        return state, Effect("skip")
    line = Line.of(state.note) if letter == "n" else Line()
    return replace(state, view="note" if letter == "n" else "flag", before=state.view, line=line), None


# Ranking


def _in_rank(state: State, key: Key, letter: str, extent: Extent) -> State:
    if key.name == "backspace":
        return _taken_back(state)
    if key.name == "control" and key.text == "u":
        return hinted(_with_tiers(state, ()), "started over")
    if key.name in ("left", "right"):
        return replace(state, top=next_stop(state, extent, +1 if key.name == "right" else -1))
    if key.name == "tab" and state.plan.criteria:
        return to_marks(state, extent)
    if letter == "=":
        return _equals(state)
    if letter and letter in ANSWER_LETTERS:
        return _placed(state, letter)
    if letter.isdecimal() and letter.isascii():
        return _digit(state, int(letter), extent)
    return unknown(state, key)


def _placed(state: State, letter: str) -> State:
    position = ANSWER_LETTERS.index(letter)
    if position >= state.count:
        return hinted(state, f"there is no answer {letter}")
    if state.tiers and position == state.tiers[-1][-1]:
        return replace(hinted(state, f"{letter} is the last one already"), is_joining=False)
    others = tuple(tuple(p for p in tier if p != position) for tier in state.tiers)
    others = tuple(tier for tier in others if tier)
    if state.is_joining and others:
        return _with_tiers(state, (*others[:-1], (*others[-1], position)))
    return _with_tiers(state, (*others, (position,)))


def _equals(state: State) -> State:
    if not state.tiers:
        return hinted(state, "= stands between two letters: first the one, then =, then the other")
    return replace(state, is_joining=True)


def _taken_back(state: State) -> State:
    if state.is_joining:
        return replace(state, is_joining=False)
    if not state.tiers:
        return hinted(state, "nothing is placed yet; u goes back to the task before")
    last = state.tiers[-1][:-1]
    return _with_tiers(state, (*state.tiers[:-1], last) if last else state.tiers[:-1])


def _with_tiers(state: State, tiers: Tiers) -> State:
    """Another ranking: how much better one was does not hold for it."""
    strength = state.strength if tiers == state.tiers else None
    return replace(state, tiers=tiers, is_joining=False, strength=strength)


def _digit(state: State, digit: int, extent: Extent) -> State:
    if state.unplaced:
        return hinted(state, "first the ranking; digits come after it" if _takes_digits(state) else _NO_DIGITS)
    if state.asks_strength:
        if 1 <= digit <= len(STRENGTHS):
            given = replace(state, strength=digit)
            return to_marks(given, extent) if given.empty_cell is not None else given
        return hinted(state, f"how much better: 1 to {len(STRENGTHS)}")
    if state.plan.criteria:
        return marked_with(to_marks(state, extent), digit, extent)
    return hinted(state, "a tie has no strength" if _takes_digits(state) else _NO_DIGITS)


_NO_DIGITS = "digits do nothing here: letters rank, best first"


def _takes_digits(state: State) -> bool:
    return bool(state.plan.criteria) or (state.plan.strengths and state.count == 2)


def _entered(state: State) -> tuple[State, Effect | None]:
    if state.is_joining:
        return warned(state, "= waits for a letter: press it, or Backspace"), None
    entry = state.entry
    if not state.unplaced and not (state.asks_strength and state.strength is None) and state.empty_cell is not None:
        answer, criterion = cell = state.empty_cell
        lacks = f"mark `{state.plan.criteria[criterion]}` of answer {ANSWER_LETTERS[answer]}: 1 to 5"
        return warned(replace(state, view="marks", cell=cell), lacks), None
    try:
        state.plan.check(entry, state.count)
    except InvalidLabelError as error:
        return warned(state, f"{error.message}: {error.hint}" if error.hint else error.message), None
    return state, Effect("submit", entry)


# Lines of text


def _in_line(state: State, key: Key, extent: Extent) -> tuple[State, Effect | None]:
    is_note = state.view == "note"
    if key.name == "escape":
        return replace(state, view=state.before, line=Line()), None
    if key.name == "enter":
        text = state.line.text.strip()
        if is_note:
            kept = replace(state, view=state.before, note=text, line=Line())
            return replace(kept, hint="noted" if text else "no note", hint_style="dim"), None
        if not text:
            return warned(state, "what is wrong with it? a flag needs a reason; Esc leaves without one"), None
        return replace(state, view=state.before, line=Line()), Effect("flag", reason=text)
    if key.name in ("pageup", "pagedown", "up", "down"):
        return scrolled(state, key, extent) or state, None
    limit = MAX_NOTE if is_note else MAX_REASON
    line = state.line.pressed(key, limit)
    if line is None:
        return unknown(state, key), None
    changed = replace(state, line=line)
    typed = key.name in ("text", "paste")
    return (
        warned(changed, f"no more than {limit:,} characters") if typed and len(line.text) >= limit else changed
    ), None


# Help and trouble


def _in_help(state: State, key: Key, extent: Extent) -> State:
    if key.name in ("escape", "enter") or (key.name == "text" and key.text.lower() in "?q"):
        return replace(state, view=state.before)
    moved = scrolled(replace(state, top=state.help_top), key, extent)
    if moved is None:
        return hinted(state, "Enter goes on to the answers")
    return replace(moved, top=state.top, help_top=moved.top)


def _in_trouble(state: State, key: Key) -> tuple[State, Effect | None]:
    assert state.trouble is not None
    if key.name == "enter":
        return replace(state, view=state.before), state.trouble.effect
    if key.name == "text" and key.text.lower() == "q":
        return state, Effect("leave" if state.trouble.effect.kind == "quit" else "quit")
    if key.name == "escape" and state.task is not None:
        return replace(state, view=state.before, trouble=None), None
    return state, None
