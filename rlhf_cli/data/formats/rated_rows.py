"""Rows that hold one completion and how good it is: KTO's `label`, HelpSteer's `helpfulness`, scores, ratings.

A ranking needs two completions of one prompt, so rows of the same prompt are put together, wherever they are in the
file. What has no other completion to be compared with, or only equally good ones, is counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from rlhf_cli.data.formats.common import ImportOptions, new_row
from rlhf_cli.data.formats.verdicts import by_numbers, number_of
from rlhf_cli.data.parsing.fields import apply_columns, is_empty, mapped_columns
from rlhf_cli.data.parsing.prompt_columns import CONTEXT
from rlhf_cli.data.readers.rows import Row, shown

_LABEL = "label"
_SCORES = ("helpfulness", "score", "rating", "reward", "overall_score")
"""Columns that say how good a completion is; the highest is best."""
_COMPLETIONS = ("completion", "response")
_OTHERS = frozenset({"chosen", "rejected", "completions", "ranking"})
_LABELS = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}


@dataclass
class _Prompt:
    """What the rows of a prompt share, and the scores of each completion, by its text or messages as JSON."""

    first: Row
    shared: Mapping[str, object]
    scores: dict[str, list[float]] = field(default_factory=dict)


class RatedRows:
    """Collects the rated completions of a source. Memory: all of them.

    Args:
        options: of the source.
        check: raises if a row of a prompt and one completion is wrong, so that an error is about this row, and leaves
            the other completions of the prompt.
    """

    def __init__(self, options: ImportOptions, check: Callable[[Row], object]) -> None:
        self._options, self._check = options, check
        self._mapped = mapped_columns(options.columns)
        self._is_read = options.comparison is None and _OTHERS.isdisjoint(options.columns)
        self._prompts: dict[str, _Prompt] = {}

    @property
    def is_used(self) -> bool:
        """Whether the source holds rated completions."""
        return bool(self._prompts)

    def take(self, row: Row) -> bool:
        """Keep a row if it holds a rated completion; return whether it does.

        Raises:
            DataError: its rating is not a number, or not true or false; or its prompt or completion is wrong.
            SkipRecordError: its completion is not to be used.
        """
        if not self._is_read or not _OTHERS.isdisjoint(row.fields):
            return False
        row = apply_columns(row, self._options.columns)
        found = _completion_of(row.fields)
        rated = _rating_name(row.fields)
        if found is None or rated is None:
            return False
        names, prompt, completion = found
        self._options.warnings.add("form", row.location, subject=f"rated completions: {', '.join([*names, rated])}")
        if (score := _score(row, rated)) is None:
            self._options.warnings.add("no verdict", row.location)
            return True
        kept = {
            name: row.fields[name] for name in CONTEXT if name in row.fields and name not in {*names, *self._mapped}
        }
        shared = {"prompt": prompt, "annotator": row.fields.get("annotator"), **kept}
        self._check(replace(row, fields={**kept, "prompt": prompt, "completion": completion}))
        key = json.dumps(shared, sort_keys=True, default=str)
        group = self._prompts.setdefault(key, _Prompt(row, shared))
        group.scores.setdefault(json.dumps(completion), []).append(score)
        return True

    def rankings(self) -> Iterator[Row]:
        """Yield a ranking, as a row of ours, for each prompt that has completions of different ratings."""
        for group in self._prompts.values():
            completions = [json.loads(text) for text in group.scores]
            means = [sum(scores) / len(scores) for scores in group.scores.values()]
            if len(set(means)) < 2 and not (self._options.unranked and len(means) > 1):
                self._options.warnings.add("not compared", group.first.location, count=len(means))
                continue
            verdict = by_numbers(group.first, "rating", means, len(means), highest_first=True)
            assert verdict is not None
            yield new_row(group.first, "", {**group.shared, "completions": completions, "ranking": verdict.tiers})


def _completion_of(fields: Mapping[str, object]) -> tuple[list[str], object, object] | None:
    """Names of the columns, prompt and completion; of a conversation, its beginning and its last turn."""
    if "prompt" in fields:
        name = next((name for name in _COMPLETIONS if name in fields), None)
        return None if name is None else (["prompt", name], fields["prompt"], fields[name])
    turns = fields.get("messages")
    if not isinstance(turns, list) or len(turns) < 2 or not isinstance(turns[-1], Mapping):
        return None
    return (["messages"], turns[:-1], turns[-1:]) if turns[-1].get("role") == "assistant" else None


def _rating_name(fields: Mapping[str, object]) -> str | None:
    """The column that rates the completion; None if there is none, or several could be it."""
    names = [name for name in (_LABEL, *_SCORES) if name in fields]
    return names[0] if len(names) == 1 else None


def _score(row: Row, name: str) -> float | None:
    """The rating as a number; None without one."""
    value = row.fields[name]
    if name != _LABEL:
        return number_of(row, name, value)
    if is_empty(value):
        return None
    if (known := _LABELS.get(str(value).strip().lower())) is None:
        raise row.error(
            f"`label` is {shown(value)}, and whether the completion is good is not clear", "write true or false"
        )
    return known
