"""Labeling at the keyboard, from the first screen to the last line."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Entry, Progress
from rlhf_cli.labeling.terminal.closing import closing_lines
from rlhf_cli.labeling.terminal.controller import Desk, Tally
from rlhf_cli.labeling.terminal.drawing import draw, extent
from rlhf_cli.labeling.terminal.tty import Ended, Resized, Suspended, Terminal, check_terminal, opened
from rlhf_cli.progress import say

_SLOW = 0.5
"""Seconds after which keys that were pressed meanwhile are dropped: they were meant for what was seen."""


@dataclass(frozen=True)
class Outcome:
    """How a visit ended.

    Attributes:
        end: the person quit, nothing was left for them, or a signal (the closing of the window too) ended it.
        tally: what was done.
        progress: afterwards.
        has_draft: a task in hand has something entered.
        is_draft_kept: it is on disk.
        signum: of `signal`; None otherwise.
    """

    end: Literal["quit", "nothing left", "signal"]
    tally: Tally
    progress: Progress
    has_draft: bool
    is_draft_kept: bool
    signum: int | None = None


def label_in_terminal(
    session: LabelSession, annotator: str, *, again: str = "", afterwards: str = "the pipeline can go on"
) -> Outcome:
    """Let one person label at the terminal until they quit, nothing is left, or a signal ends it.

    What was done and what is left is said on stderr at the end. In the main thread only, where signals arrive; SIGINT,
    SIGTERM, SIGHUP, SIGTSTP, SIGCONT and SIGWINCH are taken over meanwhile.

    Args:
        session: with a plan; left open.
        annotator: name of the person.
        again: command that goes on; said where a signal cut the work short. Whoever quits is told by the caller, which
            knows whether the pipeline waits.
        afterwards: what to do once all is labeled.

    Raises:
        UsageError: there is no terminal that can be read key by key.
        InvalidLabelError: `annotator` is no name.
        RLHFError: the store cannot be read.
    """
    check_terminal()
    person = session.annotator(annotator)
    desk = Desk(session, person)
    desk.begin()
    end: Literal["quit", "nothing left", "signal"] = "nothing left"
    signum = None
    if desk.state.view != "end":
        with opened() as terminal:
            try:
                signum = run(desk, terminal)
            except BaseException:
                desk.keep()
                raise
        end = "signal" if signum is not None else "nothing left" if desk.state.task is None else "quit"
    entered = desk.state.task is not None and desk.state.entry != Entry()
    outcome = Outcome(end, desk.tally, session.progress(person.id), entered, desk.is_draft_kept, signum)
    if signum != signal.SIGHUP:  # else nobody is there to read it
        again = "" if signum in (None, signal.SIGINT) else again
        nothing_free = end == "nothing left"
        lines = closing_lines(
            desk.tally, outcome.progress, entered, desk.is_draft_kept, again, afterwards, nothing_free
        )
        for line in lines:
            say(line)
    return outcome


def run(desk: Desk, terminal: Terminal) -> int | None:
    """Draw, wait, and do what the keys say, until the end; returns the signal that ended it, if one did."""
    while True:
        width, height = terminal.size()
        terminal.draw(draw(desk.state, width, height))
        for event in terminal.events(desk.wait):
            if isinstance(event, Ended):
                desk.keep()
                return event.signum
            if isinstance(event, Resized):
                terminal.repaint()
                continue
            began = time.monotonic()
            if isinstance(event, Suspended):
                desk.keep()
                effect = "suspend"
            else:
                done = desk.pressed(event, extent(desk.state, width, height))
                effect = None if done is None else done.kind
            if effect in ("quit", "leave"):
                return None
            if effect == "suspend":
                terminal.suspend()
                desk.woken()
            elif effect == "redraw":
                terminal.repaint()
            elif time.monotonic() - began > _SLOW:
                terminal.forget_keys()
                break
        desk.tick()
