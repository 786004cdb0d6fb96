"""Names of fields: those of each kind of record, other names in users' files, and what a row looks like."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from rlhf_cli.data.readers.rows import Row, listed, shown
from rlhf_cli.data.records import Kind
from rlhf_cli.errors import DataError, UsageError

FIELDS = (
    "prompt",
    "completion",
    "messages",
    "text",
    "chosen",
    "rejected",
    "margin",
    "completions",
    "ranking",
    "annotator",
    "subset",
    "reference",
    "system",
    "history",
)
"""Fields that are read; others are ignored, and counted if they could belong to the prompt."""
Columns = Mapping[str, str | Sequence[str]]
"""Our field -> the file's, or several of the file's, which are joined."""
NO_COLUMNS: Columns = MappingProxyType({})

EXPECTED_FIELDS: Mapping[Kind, str] = {
    "demonstration": '{"prompt", "completion"}, {"messages"} or {"text"}',
    "prompt": '{"prompt"} or {"messages"}',
    "preference": '{"prompt", "chosen", "rejected"} or {"prompt", "completions", "ranking"}',
    "ranking": '{"prompt", "completions", "ranking"} or {"prompt", "chosen", "rejected"}',
    "candidates": '{"prompt", "completions"}, with a "ranking" where it is known, or {"prompt", "chosen", "rejected"}',
}

_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "instruction", "input", "context", "source", "problem", "user"),
    "completion": ("answer", "response", "output", "target", "solution", "reply", "summary", "assistant"),
    "chosen": ("preferred", "better", "winner", "chosen_response", "response_chosen", "accepted", "positive"),
    "rejected": ("dispreferred", "worse", "loser", "rejected_response", "response_rejected", "negative"),
    "completions": ("responses", "answers", "candidates", "outputs", "replies"),
    "ranking": ("ranks", "rankings", "order", "tiers"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "text": ("content", "document", "body"),
}
_YAML_WORDS = ("yes", "no", "on", "off", "true", "false", "null", "y", "n")
_CONVERSATION_FIELDS = ("conversations", "messages")  # ShareGPT writes the first


def apply_columns(row: Row, columns: Columns) -> Row:
    """Rename the columns of a row, and join those that make one field. Columns that a row lacks are ignored."""
    fields = dict(row.fields)
    for ours, theirs in columns.items():
        if not isinstance(theirs, str):
            if (joined := join_texts(row, theirs)) is not None:
                fields[ours] = joined
        elif theirs in row.fields:
            fields[ours] = row.fields[theirs]
    return replace(row, fields=fields)


def mapped_columns(columns: Columns) -> set[str]:
    """The file's columns that a mapping names."""
    return {name for theirs in columns.values() for name in ([theirs] if isinstance(theirs, str) else theirs)}


def columns_hint(columns: Columns) -> str:
    """A hint that maps columns."""
    pairs = ", ".join(
        f"{ours}: {yaml_name(theirs) if isinstance(theirs, str) else '[' + ', '.join(map(yaml_name, theirs)) + ']'}"
        for ours, theirs in columns.items()
    )
    return f"if these are the same under other names: `--set 'data.columns={{{pairs}}}'`"


def yaml_name(name: str) -> str:
    """A column as a recipe and `--set` write it: in quotes if YAML would read something else."""
    is_plain = re.fullmatch(r"[A-Za-z_][\w .-]*", name) and name.lower() not in _YAML_WORDS and name == name.strip()
    return name if is_plain else json.dumps(name, ensure_ascii=False)


def is_empty(value: object) -> bool:
    """Whether a cell holds nothing: null, NaN, blank text, or an empty list or object, also written as text."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "[]", "{}", "null", "none", "nan", "n/a")
    return value is None or value != value or (isinstance(value, list | dict) and not value)


def join_texts(row: Row, names: Sequence[str]) -> str | None:
    """The texts of several columns, separated by blank lines; None if none of them holds anything."""
    texts = []
    for name in names:
        value = row.fields.get(name)
        if is_empty(value):
            continue
        if not isinstance(value, str):
            raise row.error(
                f"`{name}` is {shown(value)}, and a column that is joined with others holds text",
                "write it as text, or map the other columns alone",
            )
        texts.append(value)
    return "\n\n".join(texts) if texts else None


def check_columns(columns: Columns) -> None:
    """Raise `UsageError` if a mapping names a field that records do not have."""
    for ours in columns:
        if ours not in FIELDS:
            near = difflib.get_close_matches(ours, FIELDS, n=1)
            raise UsageError(
                f"`data.columns` maps `{ours}`, which is not a field of a record"
                + (f", did you mean `{near[0]}`?" if near else ""),
                hint=f"write {{ours: yours}}, where ours is one of {', '.join(FIELDS)}",
            )


def missing(row: Row, kind: Kind, lacking: tuple[str, ...], columns: Columns) -> DataError:
    """The error for a row that lacks fields: what it has, what it looks like, and how to map its columns."""
    names = " and ".join(f"`{name}`" for name in lacking)
    verb = "is" if len(lacking) == 1 else "are"
    unmapped = [f"`data.columns` maps `{o}` to `{columns[o]}`, which is not there" for o in lacking if o in columns]
    message = "; ".join([f"{names} {verb} missing; the row has {listed(row.fields)}", *unmapped])
    if hint := _mapping_hint(row, kind, lacking):
        return row.error(message, hint)
    if look := looks_like(row.fields):
        return row.error(
            f"{message}: it looks like {look}, and {_article(kind)} {'are' if kind == 'candidates' else 'is'} expected",
            _elsewhere(look, kind, row.fields),
        )
    return row.error(message, f"{_expected_fields(kind)}; {_rename_hint(row, lacking)}")


def _article(kind: Kind) -> str:
    return "completions to be ranked" if kind == "candidates" else f"a {kind}"


def _expected_fields(kind: Kind) -> str:
    what = "a record of completions to be ranked" if kind == "candidates" else f"a {kind} record"
    return f"{what} has the fields {EXPECTED_FIELDS[kind]}"


def _rename_hint(row: Row, lacking: tuple[str, ...]) -> str:
    """How to name columns that nothing is known of; with the names where there is one for each missing field."""
    texts = [name for name, value in row.fields.items() if isinstance(value, str) and name not in FIELDS]
    if len(lacking) == len(texts) == 1:
        return columns_hint({lacking[0]: texts[0]})
    pairs = ", ".join(f"{name}: NAME" for name in lacking)
    return f"name the columns that hold these with `--set 'data.columns={{{pairs}}}'`"


def _mapping_hint(row: Row, kind: Kind, lacking: tuple[str, ...]) -> str | None:
    """A `--set data.columns=...` that maps other names to all missing fields, if the row has such names."""
    names = [*lacking, *(("prompt",) if "prompt" not in row.fields and "prompt" not in lacking else ())]
    if kind in ("preference", "ranking", "candidates") and "completions" in lacking and "chosen" not in row.fields:
        pair = {name: _other_name(row.fields, name) for name in ("chosen", "rejected")}
        if all(pair.values()):
            names = [*(("prompt",) if "prompt" not in row.fields else ()), "chosen", "rejected"]
    found = {name: _other_name(row.fields, name) for name in names}
    if not all(found[name] for name in lacking if name in found) or not any(found.values()):
        return None
    pairs: dict[str, str | Sequence[str]] = {ours: theirs for ours, theirs in found.items() if theirs}
    if isinstance(question := pairs.get("prompt"), str):  # a hint must not lose what completes the question
        added = [name for name in ("context", "input") if name != question and not is_empty(row.fields.get(name))]
        pairs["prompt"] = [*added, question] if added else question
    return columns_hint(pairs)


def _other_name(fields: Mapping[str, object], ours: str) -> str | None:
    lowered = {name.strip().lower(): name for name in fields if isinstance(name, str)}
    for candidate in (ours, *_OTHER_NAMES.get(ours, ())):
        if candidate in lowered and lowered[candidate] != ours:
            return lowered[candidate]
    near = difflib.get_close_matches(ours, [name for name in lowered if name not in FIELDS], n=1, cutoff=0.8)
    return lowered[near[0]] if near else None


def looks_like(fields: Mapping[str, object]) -> str | None:
    """What kind of record a row looks like, for messages."""
    if {"chosen", "rejected"} <= fields.keys():
        return "a preference"
    if {"completions", "ranking"} <= fields.keys():
        return "a ranking"
    if {"prompt", "completions"} <= fields.keys():
        return "completions without a ranking"
    if any(name in fields for name in _CONVERSATION_FIELDS):
        return "a demonstration (a conversation)"
    if "prompt" in fields and any(name in fields for name in ("completion", *_OTHER_NAMES["completion"])):
        return "a demonstration"
    if "text" in fields:
        return "a demonstration (plain text)"
    if "prompt" in fields:
        return "a prompt without a completion"
    return None


def _elsewhere(look: str, kind: Kind, fields: Mapping[str, object]) -> str:
    """Hint: the stage that reads such records."""
    if look.startswith(("a preference", "a ranking")):
        chosen = fields.get("chosen")
        ours = "messages" if isinstance(chosen, list) and len(chosen) > 1 else "completion"
        extra = f", or train on the chosen completions with `--set 'data.columns={{{ours}: chosen}}'`"
        return f"give it to `train-rm`{extra if kind == 'demonstration' and look == 'a preference' else ''}"
    if look == "completions without a ranking":
        return f"to rank them, give them to `label` as `label.items`; {_expected_fields(kind)}"
    if look.startswith("a demonstration"):
        return f"give it to `sft`; {_expected_fields(kind)}"
    return f"records with prompts only are for `label`, `ppo` and `evaluate`; {_expected_fields(kind)}"
