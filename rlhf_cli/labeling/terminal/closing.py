"""The last lines, on the normal screen: what was done, what is left, and how to go on."""

from __future__ import annotations

from rlhf_cli.labeling.session.types import Progress
from rlhf_cli.labeling.terminal.controller import Tally
from rlhf_cli.progress import format_duration


def closing_lines(
    tally: Tally,
    progress: Progress,
    has_draft: bool,
    is_draft_kept: bool,
    again: str,
    afterwards: str,
    nothing_free: bool = False,
) -> list[str]:
    """A few lines for the person who labeled.

    Args:
        tally: of this visit.
        progress: of this person, now.
        has_draft: a task in hand has something entered.
        is_draft_kept: it is on disk.
        again: command that goes on; empty where that is said elsewhere.
        afterwards: what to do once all is labeled.
        nothing_free: what is left is in other people's hands.
    """
    lines = [_done(tally)]
    if not is_draft_kept:
        lines.append("what you entered last could not be kept: it is not on disk")
    elif has_draft:
        lines.append("the one in hand is kept as you left it")
    if progress.left_for_me:
        lines.append(f"left: {progress.left_for_me:,} for you")
        if nothing_free:
            lines.append(
                "others have these in hand just now; a task comes free half an hour after its person was last seen"
            )
        if again:
            lines.append(f"to go on where you stopped: {again}")
    elif progress.is_complete:
        lines.append(f"nothing is left: {afterwards}")
    else:
        lines.append("nothing is left for you; others are asked for the rest")
    return lines


def _done(tally: Tally) -> str:
    counts = (("ranked", tally.ranked), ("skipped", tally.skipped), ("flagged", tally.flagged))
    parts = [f"{word} {count:,}" for word, count in counts if count]
    if not parts:
        return "nothing was submitted this time"
    if tally.taken_back:
        parts.append(f"went back {_count(tally.taken_back, 'time')}")
    each = tally.ranked + tally.skipped + tally.flagged
    time = f" in {format_duration(tally.active_seconds)}"
    pace = f" ({format_duration(tally.active_seconds / each)} each)" if each > 1 else ""
    said = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"you {said}{time}{pace}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
