"""The answers, or the help, further up or down."""

from __future__ import annotations

from dataclasses import replace

from rlhf_cli.labeling.terminal.keys import Key
from rlhf_cli.labeling.terminal.state import Extent, State


def scrolled(state: State, key: Key, extent: Extent) -> State | None:
    """The state further up or down; None if that is not what the key is for."""
    top, page = min(state.top, extent.last), max(1, extent.page - 2)
    is_space = key.name == "text" and key.text == " "
    if state.view == "marks" and key.name in ("up", "down"):
        return None
    moves = {
        "up": top - 1,
        "down": top + 1,
        "pageup": top - page,
        "pagedown": top + page,
        "home": 0,
        "end": extent.last,
    }
    if not is_space and key.name not in moves:
        return None
    wanted = top + page if is_space else moves[key.name]
    return replace(state, top=max(0, min(wanted, extent.last)))


def next_stop(state: State, extent: Extent, by: int) -> int:
    """Where the next answer begins, or the one before."""
    top = min(state.top, extent.last)
    if by > 0:
        return min(next((stop for stop in extent.stops if stop > top), extent.last), extent.last)
    return next((stop for stop in reversed(extent.stops) if stop < top), 0)
