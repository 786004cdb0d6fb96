"""Checks of single values: completions, rankings, margins, annotators, subsets."""

from __future__ import annotations

import contextlib
import math

from rlhf_cli.data.parsing.conversations import text_of
from rlhf_cli.data.readers.rows import Row, shown
from rlhf_cli.data.records import Prompt
from rlhf_cli.data.skips import SkipRecordError

EMPTY, BLANK = "empty completion", "completion of white space only"
EQUAL = "chosen equal to rejected"
ALL_EQUAL = "completions all the same"
EQUAL_RANKED = "the same completion in two tiers"
NO_COMPLETION = "no assistant turn"
PROMPTS_DIFFER = "chosen and rejected differ before the last reply"
GOES_ON = "transcript does not end with a reply"


def is_blank(prompt: Prompt) -> bool:
    """Whether a prompt is empty: no text, or no message with text besides the system's."""
    if isinstance(prompt, str):
        return not prompt.strip()
    return not any(message.content.strip() for message in prompt if message.role != "system")


def check_completion(text: str) -> str:
    """Return the completion unchanged; raises `SkipRecordError` if it is empty or only white space."""
    if not text:
        raise SkipRecordError(EMPTY)
    if not text.strip():
        raise SkipRecordError(BLANK)
    return text


def tiers_of(row: Row, value: object, count: int) -> tuple[tuple[int, ...], ...]:
    """Check tiers over `count` completions: each index occurs exactly once."""
    hint = f"tiers, best first, each a list of indices: `[[2], [0, 1]]`; each of 0 to {count - 1} exactly once"
    if not isinstance(value, list) or not all(isinstance(tier, list) and tier for tier in value):
        raise row.error(f"`ranking` is {shown(value)}; a list of tiers that are lists is expected", hint)
    indices = [index for tier in value for index in tier]
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool):
            raise row.error(f"`ranking` holds {shown(index)}, which is not an index: {shown(value)}", hint)
        if not 0 <= index < count:
            raise row.error(f"`ranking` holds {index}, but there are {count} completions: {shown(value)}", hint)
        if indices.count(index) > 1:
            raise row.error(f"`ranking` holds {index} more than once: {shown(value)}", hint)
    if absent := sorted(set(range(count)) - set(indices)):
        raise row.error(f"`ranking` lacks {', '.join(map(str, absent))}: {shown(value)}", hint)
    return tuple(tuple(tier) for tier in value)


def margin_of(row: Row) -> float | None:
    """`margin`, or None if it is absent."""
    value = row.fields.get("margin")
    if row.is_text and isinstance(value, str):
        if not value.strip():
            return None
        with contextlib.suppress(ValueError):  # a value that is not a number is reported below
            value = float(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise row.error(
            f"`margin` is {shown(value)}; a finite number is expected", "remove `margin` where it is unknown"
        )
    return float(value)


def annotator_of(row: Row) -> str | None:
    """`annotator`, or None if it is absent."""
    value = row.fields.get("annotator")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise row.error(f"`annotator` is {shown(value)}; a name or a number is expected")
    return text_of(row, "annotator", str(value))


def reference_of(row: Row) -> object:
    """`reference`, any value without NaN and infinity, or None if it is absent."""
    value = row.fields.get("reference")
    if not _is_finite(value):
        raise row.error(f"`reference` is {shown(value)}; NaN and infinity are not values", "leave it empty there")
    return value


def _is_finite(value: object) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def subset_of(row: Row) -> str | None:
    """`subset`, or None if it is absent: a part of the data set whose results are reported separately."""
    value = row.fields.get("subset")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise row.error(f"`subset` is {shown(value)}; a name is expected", "remove `subset` where there is none")
    return text_of(row, "subset", str(value))
