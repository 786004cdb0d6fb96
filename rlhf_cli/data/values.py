"""Single values of a record: what an answer, a ranking, a margin and an annotator must be."""

from __future__ import annotations

import contextlib
import math

from rlhf_cli.data.conversations import text_of
from rlhf_cli.data.records import Prompt
from rlhf_cli.data.rows import Row, shown

EMPTY, BLANK = "empty completion", "completion of white space only"
EQUAL = "chosen equal to rejected"
ALL_EQUAL = "completions all the same"
EQUAL_RANKED = "the same completion in two tiers"
NO_ANSWER = "no assistant turn"
PROMPTS_DIFFER = "chosen and rejected differ before the last reply"
GOES_ON = "transcript does not end with a reply"


class SkipRecordError(Exception):
    """A record that is left out and counted; no error of the user's."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_blank(prompt: Prompt) -> bool:
    """Whether nothing is asked: no text, or no message with any besides the system's."""
    if isinstance(prompt, str):
        return not prompt.strip()
    return not any(message.content.strip() for message in prompt if message.role != "system")


def answer_of(text: str) -> str:
    """The answer as it is; raises `SkipRecordError` where there is nothing to learn from."""
    if not text:
        raise SkipRecordError(EMPTY)
    if not text.strip():
        raise SkipRecordError(BLANK)
    return text


def tiers_of(row: Row, value: object, count: int) -> tuple[tuple[int, ...], ...]:
    """Tiers over `count` completions, each index in one of them exactly once."""
    hint = f"tiers, best first, each a list of indices: `[[2], [0, 1]]`; each of 0 to {count - 1} exactly once"
    if not isinstance(value, list) or not all(isinstance(tier, list) and tier for tier in value):
        raise row.error(f"`ranking` is {shown(value)}; a list of tiers that are lists is expected", hint)
    indices = [index for tier in value for index in tier]
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool):
            raise row.error(f"`ranking` holds {shown(index)}, which is no index: {shown(value)}", hint)
        if not 0 <= index < count:
            raise row.error(f"`ranking` holds {index}, and there are {count} completions: {shown(value)}", hint)
        if indices.count(index) > 1:
            raise row.error(f"`ranking` holds {index} more than once: {shown(value)}", hint)
    if absent := sorted(set(range(count)) - set(indices)):
        raise row.error(f"`ranking` leaves out {', '.join(map(str, absent))}: {shown(value)}", hint)
    return tuple(tuple(tier) for tier in value)


def margin_of(row: Row) -> float | None:
    """`margin`, where it is given."""
    value = row.fields.get("margin")
    if row.is_text and isinstance(value, str):
        if not value.strip():
            return None
        with contextlib.suppress(ValueError):  # what is no number is reported below
            value = float(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise row.error(
            f"`margin` is {shown(value)}; a finite number is expected", "leave `margin` out where it is unknown"
        )
    return float(value)


def annotator_of(row: Row) -> str | None:
    """`annotator`, where it is given."""
    value = row.fields.get("annotator")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise row.error(f"`annotator` is {shown(value)}; a name or a number is expected")
    return text_of(row, "annotator", str(value))


def subset_of(row: Row) -> str | None:
    """`subset`, where it is given: part of a data set by which results are counted."""
    value = row.fields.get("subset")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise row.error(f"`subset` is {shown(value)}; a name is expected", "leave `subset` out where there is none")
    return text_of(row, "subset", str(value))
