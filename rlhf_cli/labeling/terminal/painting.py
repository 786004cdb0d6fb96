"""Converts rows to terminal bytes; the only module here that writes escape sequences."""

from __future__ import annotations

from rlhf_cli.labeling.terminal.drawing import Screen
from rlhf_cli.labeling.terminal.wrapping import Row, Style

ENTER = "\x1b[?1049h\x1b[?7l\x1b[?25l\x1b[?2004h\x1b[H\x1b[2J"
"""Alternate screen; no wrapping at the margin, so that a wider character than expected affects only its own row; hidden
cursor; bracketed paste."""
LEAVE = "\x1b[?2004l\x1b[?25h\x1b[?7h\x1b[0m\x1b[H\x1b[2J\x1b[?1049l"
"""The reverse of `ENTER`; clears the screen first, for terminals without an alternate screen."""

_LOOKS: dict[Style, tuple[str, str]] = {  # (colored, without colors)
    "plain": ("", ""),
    "dim": ("2", "2"),
    "bold": ("1", "1"),
    "tag": ("1;7", "1;7"),
    "good": ("32", ""),
    "accent": ("36", "1"),
    "mark": ("35", "7"),
    "warn": ("33", "1"),
    "error": ("1;31", "1"),
    "chosen": ("1;7", "1;7"),
}


def paint(screen: Screen, shown: tuple[str, ...], *, is_colored: bool) -> tuple[str, tuple[str, ...]]:
    """Compute the bytes that update the terminal.

    Args:
        screen: to show.
        shown: rows on the terminal, as returned by the previous call; empty if unknown.
        is_colored: use colors in addition to bold, dim and reverse.

    Returns:
        The bytes as text, and the rows for the next call.
    """
    rows = tuple(_row(row, is_colored) for row in screen.rows)
    is_fresh = len(shown) != len(rows)
    parts = ["\x1b[?25l"]
    if is_fresh:
        parts.append("\x1b[0m\x1b[2J")
    for number, row in enumerate(rows):
        if is_fresh or shown[number] != row:
            parts.append(f"\x1b[{number + 1};1H\x1b[0m\x1b[2K{row}")
    if screen.cursor is not None:
        parts.append(f"\x1b[{screen.cursor[0] + 1};{screen.cursor[1] + 1}H\x1b[?25h")
    return "".join(parts) if len(parts) > 1 else "", rows


def _row(row: Row, is_colored: bool) -> str:
    parts: list[str] = []
    for piece in row:
        if piece.at is not None:
            parts.append(f"\x1b[{piece.at + 1}G")
        look = _LOOKS[piece.style][0 if is_colored else 1]
        parts.append(f"\x1b[{look}m{piece.text}\x1b[0m" if look else piece.text)
    return "".join(parts)
