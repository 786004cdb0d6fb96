"""Labeling in the terminal: the main loop, and a summary at the end."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.durations import format_duration
from rlhf_cli.labeling.session.progress import tasks_note
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Entry, SamplerStatus, SessionProgress
from rlhf_cli.labeling.terminal.controller import Controller, VisitCounts
from rlhf_cli.labeling.terminal.drawing import draw, scroll_area
from rlhf_cli.labeling.terminal.tty import Ended, Resized, Suspended, Terminal, check_terminal, opened
from rlhf_cli.progress import say

_SLOW = 0.5
"""If an action takes longer, keys pressed meanwhile are discarded: they were meant for the previous screen."""


End = Literal["quit", "nothing left", "signal", "sampling failed"]


@dataclass(frozen=True)
class Outcome:
    """Result of a visit.

    Attributes:
        end: the annotator quit, nothing was left, a signal (including a closed window) ended it, or sampling failed.
        counts: labels given.
        progress: afterwards.
        has_draft: the open task has an entry.
        is_draft_kept: it is on disk.
        signum: of `signal`; None otherwise.
        note: why there are more tasks than prompts; empty if there are not.
    """

    end: End
    counts: VisitCounts
    progress: SessionProgress
    has_draft: bool
    is_draft_kept: bool
    signum: int | None = None
    note: str = ""


def label_in_terminal(
    session: LabelSession,
    annotator: str,
    *,
    resume_command: str = "",
    afterwards: str,
    sampler: SamplerStatus | None = None,
) -> Outcome:
    """Let one annotator label in the terminal until they quit, nothing is left, or a signal arrives.

    Prints a summary on stderr at the end. For the main thread only, which receives signals: SIGINT, SIGTERM, SIGHUP,
    SIGTSTP, SIGCONT and SIGWINCH are handled here meanwhile.

    Args:
        session: with a plan; not closed.
        annotator: name.
        resume_command: printed if a signal ends the visit. After a normal quit the caller says how to resume, since it
            knows whether the pipeline waits.
        afterwards: what to do once labeling is complete.
        sampler: what may be sampling meanwhile; if it fails, the visit ends.

    Raises:
        UsageError: the terminal cannot be used.
        InvalidLabelError: the name is invalid.
        RLHFError: the store cannot be read.
    """
    check_terminal()
    person = session.annotator(annotator)
    controller = Controller(session, person, sampler=sampler)
    controller.begin()
    signum = None
    if controller.state.view != "end" or controller.state.is_waiting:
        with opened() as terminal:
            try:
                signum = run(controller, terminal)
            except BaseException:
                controller.keep()
                raise
    end = _end(controller, signum)
    entered = controller.state.task is not None and controller.state.entry != Entry()
    progress = session.progress(person.id)
    note = tasks_note(progress, session.plan)
    outcome = Outcome(end, controller.counts, progress, entered, controller.is_draft_kept, signum, note)
    if signum != signal.SIGHUP:  # otherwise nobody can read it
        for line in closing_lines(outcome, "" if signum in (None, signal.SIGINT) else resume_command, afterwards):
            say(line, always=True)
    return outcome


def _end(controller: Controller, signum: int | None) -> End:
    if signum is not None:
        return "signal"
    if controller.has_failed:
        return "sampling failed"
    return "quit" if controller.state.task is not None or controller.state.is_waiting else "nothing left"


def run(controller: Controller, terminal: Terminal) -> int | None:
    """Draw, wait for events and handle them until the end; returns the signal that ended the loop, if any."""
    while not controller.has_failed:
        width, height = terminal.size()
        terminal.draw(draw(controller.state, width, height))
        for event in terminal.events(controller.wait):
            if isinstance(event, Ended):
                controller.keep()
                return event.signum
            if isinstance(event, Resized):
                terminal.repaint()
                continue
            began = time.monotonic()
            if isinstance(event, Suspended):
                controller.keep()
                effect = "suspend"
            else:
                done = controller.pressed(event, scroll_area(controller.state, width, height))
                effect = None if done is None else done.kind
            if effect in ("quit", "leave"):
                return None
            if effect == "suspend":
                terminal.suspend()
                controller.woken()
            elif effect == "redraw":
                terminal.repaint()
            elif time.monotonic() - began > _SLOW:
                terminal.forget_keys()
                break
        controller.tick()
    controller.keep()
    return None


def closing_lines(outcome: Outcome, resume_command: str, afterwards: str) -> list[str]:
    """Summary for the annotator after the terminal was restored.

    Args:
        outcome: of the visit.
        resume_command: command that resumes labeling; empty to omit it.
        afterwards: what to do once labeling is complete.
    """
    progress = outcome.progress
    lines = [_done(outcome.counts)]
    if outcome.note and not progress.left_for_me:
        lines.append(outcome.note)
    if not outcome.is_draft_kept:
        lines.append("your last entry could not be saved")
    elif outcome.has_draft:
        lines.append("the open task is saved as a draft")
    if progress.left_for_me:
        lines.append(f"left: {progress.left_for_me:,} for you")
        if progress.growth is not None:
            lines.append(str(progress.growth))
        elif outcome.end == "nothing left":
            lines.append(
                "others are working on these; a task becomes available 30 minutes after its annotator was last active"
            )
        if resume_command:
            lines.append(f"to resume: {resume_command}")
    elif progress.is_complete:
        lines.append(f"labeling is complete: {afterwards}")
    else:
        lines.append("nothing is left for you; the rest is assigned to others")
    return lines


def _done(counts: VisitCounts) -> str:
    parts = [("ranked", counts.ranked), ("skipped", counts.skipped), ("flagged", counts.flagged)]
    done = [f"{word} {count:,}" for word, count in parts if count]
    if not done:
        return "no labels were submitted"
    if counts.undone:
        done.append(f"undid {counts.undone:,}")
    total = counts.ranked + counts.skipped + counts.flagged
    pace = f" ({format_duration(counts.active_seconds / total)} each)" if total > 1 else ""
    said = done[0] if len(done) == 1 else ", ".join(done[:-1]) + " and " + done[-1]
    return f"you {said} in {format_duration(counts.active_seconds)}{pace}"
