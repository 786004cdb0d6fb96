"""Comparisons written as completion columns and a verdict: those that users map, and published schemas by their names.

`KNOWN` is the whole list of what is recognized; each entry says in `data.comparison`'s own terms how it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rlhf_cli.data.formats.common import PROMPT_NAMES, ImportOptions, Part, completion_names, new_row
from rlhf_cli.data.formats.paths import ABSENT, column_of, value_at
from rlhf_cli.data.formats.verdicts import Verdict, by_numbers, by_strength, by_winner, is_winner
from rlhf_cli.data.parsing.fields import is_empty, mapped_columns
from rlhf_cli.data.parsing.prompt_columns import CONTEXT
from rlhf_cli.data.readers.rows import Row, listed, shown
from rlhf_cli.data.skips import OmitRecordError
from rlhf_cli.settings.comparison import ComparisonSettings, Reading


@dataclass(frozen=True)
class Known:
    """A schema that is recognized by its columns.

    Attributes:
        name: for messages.
        how: its columns and how they are read.
        turns: column that says how many turns of the conversations were compared.
    """

    name: str
    how: ComparisonSettings
    turns: str | None = None

    @cached_property
    def columns(self) -> frozenset[str]:
        """The columns that its paths begin in; most rows are told apart by them alone."""
        return frozenset(map(column_of, _paths(self.how)))


def _known(
    name: str,
    completions: str,
    verdict: str = "",
    read_as: Reading = "winner",
    *,
    prompt: str | None = None,
    values: Mapping[str, str] | None = None,
    annotator: str | None = None,
    turns: str | None = None,
) -> Known:
    names: list[str] = verdict.split()
    column = None if not names else names[0] if len(names) == 1 else names
    how = ComparisonSettings(
        completions=completions.split(),
        verdict=column,
        read_as=read_as,
        values=dict(values or {}),
        prompt=prompt,
        annotator=annotator,
    )
    return Known(name, how, turns)


_INDICES = {"0": "0", "1": "1"}
_SHP = {"1": "human_ref_A", "0": "human_ref_B"}
_PREFERENCE = {"0": "tie", "1.5": "tie"}
_ACCEPTED = {"accept": "accept.text", "reject": "skip", "ignore": "skip"}
_SUMMARIES = "summarize-from-feedback"
KNOWN = (
    _known("Arena", "conversation_a conversation_b", "winner", annotator="judge", turns="turn"),
    _known("Arena", "response_a response_b", "winner_model_a winner_model_b", "scores", prompt="prompt"),
    _known("HelpSteer", "response_1 response_2", "preference_strength", "strength", prompt="prompt"),
    _known("HelpSteer", "response1 response2", "overall_preference", "strength", prompt="context"),
    _known("SHP", "human_ref_A human_ref_B", "labels", prompt="history", values=_SHP),
    _known("WebGPT", "answer_0 answer_1", "score_0 score_1", "scores", prompt="question.full_text"),
    _known("WebGPT", "answer_0 answer_1", "score_0 score_1", "scores", prompt="question"),
    _known("PKU", "response_0 response_1", "better_response_id", prompt="prompt"),
    _known("AlpacaFarm", "output_1 output_2", "preference", values=_PREFERENCE, annotator="annotator"),
    _known("UltraFeedback", "completions[].response", "completions[].overall_score", "scores", prompt="instruction"),
    _known("Nectar", "answers[].answer", "answers[].rank", "ranks", prompt="prompt"),
    _known(_SUMMARIES, "summaries[].text", "choice", prompt="info.post", values=_INDICES, annotator="worker"),
    _known(_SUMMARIES, "summaries[].text", "choice", prompt="info.article", values=_INDICES, annotator="worker"),
    _known("Stack Exchange pairs", "response_j response_k", "", "order", prompt="question"),
    _known("OpenAI preferences", "preferred_output non_preferred_output", "", "order", prompt="input.messages"),
    _known("Prodigy", "accept.text reject.text", "answer", prompt="input.text", values=_ACCEPTED),
    _known("a conversation and its rejected reply", "messages rejected_response", "", "order"),
    _known("a conversation and its rejected one", "messages rejected_messages", "", "order"),
    _known("scores per completion", "completions[]", "scores", "scores", prompt="prompt"),
    _known("ranks per completion", "completions[]", "ranks", "ranks", prompt="prompt"),
)  # fmt: skip
_WINNERS = ("winner", "verdict", "preferred", "preference", "choice", "better", "best", "label", "selected", "vote")
"""Usual names of a verdict column, for completions that are named alike."""
_COMPLETION = re.compile(
    r"(assistant|response|answer|completion|output|option|candidate|conversation|summary|text|reply)", re.IGNORECASE
)
"""How the names of completion columns begin."""


def recognize(row: Row) -> Known | None:
    """The schema of a row: a published one, or completions that are named alike beside a usual verdict; else None."""
    fields = row.fields
    if "chosen" in fields or "rejected" in fields or "ranking" in fields:
        return None
    for known in KNOWN:
        if known.columns <= fields.keys() and all(value_at(fields, path) is not ABSENT for path in _paths(known.how)):
            return known
    completions = completion_names([name for name in fields if _COMPLETION.match(name)])
    if not completions or not all(isinstance(fields[name], str | list) for name in completions):
        return None
    verdict = next((name for name in fields if name.lower() in _WINNERS), None)
    if "annotation_id" in fields:
        taken = {*completions, *PROMPT_NAMES}
        others = [name for name in fields if name not in taken and is_winner(fields[name], completions)]
        if not others:
            raise OmitRecordError("no verdict")
        return Known("Label Studio", ComparisonSettings(completions=completions, verdict=others[0]))
    return (
        None if verdict is None else Known("a comparison", ComparisonSettings(completions=completions, verdict=verdict))
    )


def _paths(how: ComparisonSettings) -> list[str]:
    verdict = [how.verdict] if isinstance(how.verdict, str) else how.verdict or []
    return [*([how.prompt] if how.prompt else []), *how.completions, *verdict]


def given(row: Row, how: ComparisonSettings, *, is_prompt: bool) -> Known | None:
    """The schema that `data.comparison` describes; None for one of our own rows, which needs no description.

    Args:
        row: of a user's file.
        how: `data.comparison`.
        is_prompt: a row without its columns may hold a prompt.

    Raises:
        DataError: the row lacks a column of it.
    """
    fields = row.fields
    if is_prompt and any(value_at(fields, path) is ABSENT for path in _paths(how)):
        return None
    if {"chosen", "rejected"} <= fields.keys() or {"completions", "ranking"} <= fields.keys():
        return None
    for path in _paths(how):
        if value_at(row.fields, path) is ABSENT:
            raise row.error(
                f"`data.comparison` names `{path}`, which is not there; the row has {listed(row.fields)}",
                "name a column, or a path such as `question.text` or `answers[].text`",
            )
    return Known("`data.comparison`", how)


def convert(row: Row, known: Known, options: ImportOptions) -> Iterator[Part]:
    """Yield the ranking of a row; the completions alone if there is no verdict and unranked ones are accepted."""
    how = known.how
    prompt, completions, names = _texts(row, known)
    options.warnings.add("form", row.location, subject=f"{known.name}: {', '.join(_paths(how))}")
    verdict = _verdict(row, how, names)
    if verdict is None and not options.unranked:
        options.warnings.add("no verdict", row.location)
        return
    context = {*CONTEXT, *mapped_columns(options.columns)} - known.columns
    kept = {name: value for name, value in row.fields.items() if name in context}
    if how.prompt is not None and isinstance(around := row.fields.get(column_of(how.prompt)), Mapping):
        kept |= {name: value for name, value in around.items() if name in ("tools", "functions")}
    annotator = value_at(row.fields, how.annotator) if how.annotator else row.fields.get("annotator")
    ours: dict[str, object] = {"prompt": prompt, "completions": completions}
    ours["annotator"] = annotator if isinstance(annotator, str | int) else None
    if verdict is not None:
        ours |= {"ranking": verdict.tiers, "margin": verdict.margin}
    yield new_row(row, "", kept | ours)


def _texts(row: Row, known: Known) -> tuple[object, Sequence[object], list[str]]:
    """The prompt, None if it is in the completions; the completions; and their names."""
    how = known.how
    values = [value_at(row.fields, path) for path in how.completions]
    names = list(how.completions)
    if len(values) == 1:
        if not isinstance(values[0], list) or len(values[0]) < 2:
            raise row.error(
                f"`{names[0]}` is {shown(values[0])}; at least two completions are expected",
                "name two columns in `completions`, or a path of a list such as `answers[].text`",
            )
        values = [None if value is ABSENT else value for value in values[0]]
        names = [f"{how.completions[0]} {index}" for index in range(len(values))]
    prompt = value_at(row.fields, how.prompt) if how.prompt else row.fields.get("prompt")
    turns = [_strings(value) for value in (prompt, *values)]
    if all(turns) and len(turns) == len(values) + 1:  # turns of the user and of each model, in lists of their own
        asked, *replies = [list(one or ()) for one in turns]
        if any(len(one) != len(asked) for one in replies):
            raise row.error(f"the turns of {listed(names)} are not as many as those of the prompt", "complete them")
        return None, [_interleaved(asked, one) for one in replies], names
    limit = row.fields.get(known.turns) if known.turns else None
    if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
        values = [_first_turns(value, limit) for value in values]
    return prompt, values, names


def _strings(value: object) -> list[str] | None:
    """A list of texts, also as JSON text in a cell."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) and value and all(isinstance(one, str | None) for one in value) else None


def _interleaved(asked: list[str], replies: list[str]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for pair in zip(asked, replies, strict=True)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _first_turns(value: object, count: int) -> object:
    """A conversation up to the reply of the given turn of the user."""
    if not isinstance(value, list):
        return value
    replies = [i for i, turn in enumerate(value) if isinstance(turn, Mapping) and turn.get("role") == "assistant"]
    return value[: replies[count - 1] + 1] if len(replies) > count else value


def _verdict(row: Row, how: ComparisonSettings, names: list[str]) -> Verdict | None:
    if how.verdict is None:
        return Verdict([[index] for index in range(len(names))])
    if isinstance(how.verdict, list):
        field, value = ", ".join(how.verdict), [value_at(row.fields, path) for path in how.verdict]
        if all(map(is_empty, value)):
            return None
    else:
        field, value = how.verdict, value_at(row.fields, how.verdict)
    if how.read_as == "winner":
        return by_winner(row, field, value, names, how)
    if how.read_as == "strength":
        return by_strength(row, field, value, len(names))
    return by_numbers(row, field, value, len(names), highest_first=how.read_as == "scores")
