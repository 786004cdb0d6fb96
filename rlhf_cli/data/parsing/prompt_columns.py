"""The columns that a prompt is made of, such as `instruction`, `input`, `system` and `history`, put into `prompt`.

Columns that could restrict or complete the prompt and are not read are counted, so that nothing is lost unsaid.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace

from rlhf_cli.data.parsing.cells import is_turn
from rlhf_cli.data.parsing.conversations import MEDIA, is_transcript
from rlhf_cli.data.parsing.fields import columns_hint, is_empty, join_texts
from rlhf_cli.data.readers.rows import Row, listed, shown
from rlhf_cli.data.skips import OmitRecordError, SkipRecordError
from rlhf_cli.data.warnings import WarningLog

SYSTEM = ("system", "system_prompt", "system_message")
QUESTIONS = ("question", "instruction", "query", "input", "problem", "conversations", "messages")
"""Columns that may be the prompt of a preference that has no `prompt`."""
_ADDED = ("input", "context")
"""Columns that complete an `instruction`."""
_UNREAD = (*SYSTEM, *_ADDED, "instruction", "question", "history", "tools", "functions", "documents")
_REJECTED = ("rejected_response", "rejected_messages")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
CONTEXT = (*_UNREAD, *_MEDIA)
"""Columns that say something about the prompt."""


def omit_if_excluded(row: Row) -> None:
    """Raise `OmitRecordError` if a demonstration is marked as bad or rejected by its annotator."""
    fields = row.fields
    if "completion" in fields and str(fields.get("label")).strip().lower() in ("false", "0", "0.0"):
        raise OmitRecordError("label false")
    if "_task_hash" in fields and fields.get("answer") in ("reject", "ignore"):
        raise OmitRecordError("not accepted")


def with_whole_prompt(row: Row, mapped: Iterable[str], warnings: WarningLog) -> Row:
    """Put the columns that belong to the prompt into it.

    Args:
        row: one of ours, or one with the columns of Alpaca: `instruction`, `input`, `system`, `history`, `output`.
        mapped: columns that `data.columns` names, which are read already.
        warnings: collects the columns that are not read.

    Raises:
        DataError: several columns could be the prompt, or the system message is given twice.
        SkipRecordError: the row has images, audio or video.
    """
    fields, used = dict(row.fields), set(mapped)
    if any(not is_empty(fields.get(name)) for name in _MEDIA):
        raise SkipRecordError(MEDIA)
    if "prompt" not in fields:
        used |= _add_prompt(row, fields, warnings)
    used |= _add_system(row, fields)
    for name in (*_UNREAD, *_REJECTED):
        if name not in used and not is_empty(fields.get(name)):
            warnings.add("column not read", row.location, subject=name)
    return replace(row, fields=fields)


def _add_prompt(row: Row, fields: dict[str, object], warnings: WarningLog) -> set[str]:
    """Add `prompt` where other columns make it, and the `completion` of Alpaca; returns the columns used."""
    instruction = fields.get("instruction")
    if isinstance(instruction, str) and not any(name in fields for name in ("question", "messages", "conversations")):
        parts = ["instruction", *(name for name in _ADDED if not is_empty(fields.get(name)))]
        fields["prompt"] = join_texts(row, parts) or ""
        reply = next((name for name in ("output", "response") if name in fields), None)
        if "completion" not in fields and reply is not None:
            fields["completion"] = fields[reply]
        read = listed([name for name in ("instruction", *_ADDED, *SYSTEM, "history") if name in fields])
        warnings.add("form", row.location, subject=f"Alpaca: {read}")
        return {"instruction", *_ADDED}
    if fields.get("chosen") is None or fields.get("rejected") is None or _holds_prompt(fields["chosen"]):
        return set()
    found = [name for name in QUESTIONS if not is_empty(fields.get(name))]
    if not found:
        return set()
    others = [name for name in _ADDED if name not in found and not is_empty(fields.get(name))]
    if len(found) > 1 or others:
        raise row.error(
            f"`prompt` is missing, and {listed([*found, *others])} could be it",
            columns_hint({"prompt": sorted([*others, *found], key=lambda name: name not in _ADDED)}),
        )
    fields["prompt"] = fields[found[0]]
    warnings.add("prompt column", row.location, subject=found[0])
    return set(found)


def _holds_prompt(chosen: object) -> bool:
    """Whether a chosen completion is a whole conversation, which begins with its prompt."""
    if isinstance(chosen, str):
        return is_transcript(chosen)
    return isinstance(chosen, list) and len(chosen) > 1 and is_turn(chosen[0])


def _add_system(row: Row, fields: dict[str, object]) -> set[str]:
    """Put a system message and earlier turns before the prompt, which becomes a conversation; returns their columns."""
    names = {name for name in SYSTEM if isinstance(fields.get(name), str)}
    names |= {"system"} if "system" in fields and fields["system"] is None else set()
    given = [str(fields[name]) for name in SYSTEM if name in names and not is_empty(fields[name])]
    turns = _turns_of_history(row, fields.get("history"))
    if len(set(given)) > 1:
        raise row.error(f"the system message is given twice, in {listed(sorted(names))}", "keep one of these columns")
    if not names and turns is None:
        return set()
    system, is_read = (given[0] if given else None), False
    for name in ("prompt", "messages", "conversations", "chosen", "rejected"):
        value = fields.get(name)
        if name in ("chosen", "rejected") and not (isinstance(value, list) and _holds_prompt(value)):
            continue
        if name == "prompt" and isinstance(value, str) and is_transcript(value):
            continue
        if isinstance(value, str | list) and value:
            fields[name] = _with_turns(row, value, system, turns or [])
            is_read = True
    return names | ({"history"} if turns is not None else set()) if is_read else set()


def _with_turns(row: Row, value: str | list[object], system: str | None, turns: list[object]) -> list[object]:
    """A prompt or a whole conversation as messages, after a system message and earlier turns."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    first = value[0]
    own = first.get("content", first.get("value")) if isinstance(first, Mapping) and _role(first) == "system" else None
    if system is not None and own is not None and own != system:
        raise row.error(f"the system message is given twice: {shown(system, 30)} and {shown(own, 30)}", "keep one")
    head = [{"role": "system", "content": system}] if system is not None and own is None else []
    return [*head, *turns, *value]


def _role(turn: Mapping[str, object]) -> object:
    return turn.get("role", turn.get("from"))


def _turns_of_history(row: Row, history: object) -> list[object] | None:
    """Earlier turns of Alpaca, pairs of a question and a reply; None if the column is not in this form."""
    if isinstance(history, str) and history.lstrip().startswith("["):
        try:
            history = json.loads(history)
        except (ValueError, RecursionError):
            return None
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        return None
    return [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
