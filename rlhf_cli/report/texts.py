"""Texts of models and files on a page: visible, of bounded length, and with their differences marked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from rlhf_cli.labeling.terminal.visible import clusters, lines_of

LONGEST = 1_500
"""Characters of a text on the page."""

_WORDS = re.compile(r"\s+|[^\s]+")
_COMPARED = 600
"""Words up to which differences are marked: the work grows with the product of both lengths."""

Pieces = list[tuple[str, str]]
"""("", text as it is), ("del", text of the baseline alone), ("ins", text of the policy alone), ("em", our own note)."""


def visible(text: str) -> str:
    """Return a text in which control, bidirectional and invisible characters are visible codes."""
    return "\n".join("".join(cluster.text for cluster in clusters(line)) for line in lines_of(text))


def shortened(text: str, longest: int = LONGEST) -> tuple[str, str]:
    """Return the beginning of a text, visible, and a note on what is omitted, or ""."""
    if len(text) <= longest:
        return visible(text), ""
    return visible(text[:longest]), f" … {len(text) - longest:,} more characters"


def side_by_side(baseline: str, policy: str) -> tuple[Pieces, Pieces]:
    """Return both texts in pieces: equal ones, and those of one text alone."""
    (first, first_rest), (second, second_rest) = shortened(baseline), shortened(policy)
    a, b = _WORDS.findall(first), _WORDS.findall(second)
    if max(len(a), len(b)) > _COMPARED:
        found: tuple[Pieces, Pieces] = [("", first)], [("", second)]
    else:
        codes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
        found = (
            [piece for tag, i, j, _, _ in codes for piece in _piece("del", tag, "".join(a[i:j]))],
            [piece for tag, _, _, i, j in codes for piece in _piece("ins", tag, "".join(b[i:j]))],
        )
    for pieces, rest in zip(found, (first_rest, second_rest), strict=True):
        if rest:
            pieces.append(("em", rest))
        if not any(text.strip() for _, text in pieces):
            pieces[:] = [("em", "(empty)")]
    return found


def _piece(mark: str, tag: str, text: str) -> Iterator[tuple[str, str]]:
    if text:
        yield ("" if tag == "equal" else mark, text)
