"""Benchmarks of reward models, read from files in their published columns.

format           columns                                                   published at
rewardbench    prompt, chosen, rejected (text), subset                   hub: allenai/reward-bench
rewardbench-2  prompt, chosen, rejected (lists), num_correct, subset, id hub: allenai/reward-bench-2
rm-bench       prompt, chosen, rejected (three texts each), domain       hub: THU-KEG/RM-Bench
judgebench     question, response_A, response_B, label, source           hub: ScalerLab/JudgeBench
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.data.parsing.cells import decoded_cell
from rlhf_cli.data.parsing.conversations import text_of
from rlhf_cli.data.parsing.prompts import PromptReader
from rlhf_cli.data.readers.resolve import rows_of
from rlhf_cli.data.readers.rows import Row, listed, shown
from rlhf_cli.data.records import Prompt
from rlhf_cli.data.warnings import WarningLog
from rlhf_cli.errors import DataError

BenchmarkFormat = Literal["rewardbench", "rewardbench-2", "rm-bench", "judgebench"]

STYLES = 3
"""Completions of each side in RM-Bench, from concise to detailed with markdown."""

_LABELS = ("A>B", "B>A")
_PAIR = {"prompt", "chosen", "rejected"}
_JUDGED = {"question", "response_A", "response_B", "label"}
_SCHEMAS = (
    "columns of a benchmark: prompt, chosen, rejected and subset (RewardBench, RewardBench 2) or domain (RM-Bench), "
    "or question, response_A, response_B, label and source (JudgeBench)"
)


@dataclass(frozen=True)
class Item:
    """One row of a benchmark.

    Attributes:
        prompt: of all completions.
        chosen: completions that should get the higher rewards.
        rejected: the others.
        subset: part of the benchmark.
        kind: in the Ties subset of RewardBench 2, `ref` for one correct completion and `tied` for several; else empty.
        number: in that subset, what a `ref` row and its `tied` row have in common.
    """

    prompt: Prompt
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    subset: str
    kind: str = ""
    number: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that was read.

    Attributes:
        source: file, folder or hub data set.
        format: what it is.
        items: its rows.
    """

    source: str
    format: BenchmarkFormat
    items: list[Item]


def read_benchmark(source: str) -> Benchmark:
    """Read a benchmark; its format is recognized by the columns of the first row.

    Raises:
        DataError: the source cannot be read, does not hold a benchmark, or a row is wrong.
    """
    format: BenchmarkFormat | None = None
    items: list[Item] = []
    prompts = PromptReader(WarningLog())
    seen: dict[tuple[str, str], str] = {}
    for row in rows_of(source):
        own = _format_of(row)
        format = format or own
        if own != format:
            raise row.error(f"this row is in the format of {own}, and the rows before it in that of {format}")
        item = _READERS[format](row, prompts)
        if item.kind:
            first = seen.setdefault((item.kind, item.number), row.location)
            if first != row.location:
                raise row.error(f"`id` is `{item.kind}:{item.number}`, as at {first}", "give each row its own id")
        items.append(item)
    if format is None:
        raise DataError(f"{source}: no rows", hint=_SCHEMAS)
    return Benchmark(source, format, items)


def _format_of(row: Row) -> BenchmarkFormat:
    fields = row.fields
    if fields.keys() >= _JUDGED:
        return "judgebench"
    if not fields.keys() >= _PAIR:
        raise row.error(f"no benchmark has these columns: {listed(fields)}", _SCHEMAS)
    if "domain" in fields:
        return "rm-bench"
    if "num_correct" in fields or "total_completions" in fields:
        return "rewardbench-2"
    if isinstance(fields["chosen"], list):
        return "rm-bench" if _is_of_styles(fields) else "rewardbench-2"
    if "subset" in fields:
        return "rewardbench"
    raise row.error(f"no benchmark has these columns: {listed(fields)}", _SCHEMAS)


def _is_of_styles(fields: Mapping[str, object]) -> bool:
    sides = (fields["chosen"], fields["rejected"])
    return all(isinstance(side, list) and len(side) == STYLES for side in sides)


def _rewardbench(row: Row, prompts: PromptReader) -> Item:
    chosen, rejected = (text_of(row, name, row.fields[name]) for name in ("chosen", "rejected"))
    return Item(prompts.prompt(row), (chosen,), (rejected,), _name(row, "subset"))


def _rewardbench_2(row: Row, prompts: PromptReader) -> Item:
    chosen, rejected, subset = _texts(row, "chosen"), _texts(row, "rejected"), _name(row, "subset")
    if subset.lower() != "ties":
        if len(chosen) != 1:
            raise row.error(
                f"`chosen` has {len(chosen)} completions; rows of subset `{subset}` have one correct completion"
            )
        return Item(prompts.prompt(row), chosen, rejected, subset)
    found = re.fullmatch(r"(ref|tied):(.+)", str(row.fields.get("id")))
    if found is None:
        raise row.error(
            f"`id` is {shown(row.fields.get('id'))}; the Ties subset has `ref:N` and `tied:N`",
            "the score of this subset compares a row with one correct completion (`ref`) and one with several (`tied`)",
        )
    if found[1] == "tied" and len(chosen) < 2:
        raise row.error("a `tied` row of the Ties subset has several correct completions; `chosen` has one")
    return Item(prompts.prompt(row), chosen, rejected, "Ties", found[1], found[2])


def _rm_bench(row: Row, prompts: PromptReader) -> Item:
    chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
    if len(chosen) != STYLES or len(rejected) != STYLES:
        raise row.error(
            f"`chosen` has {len(chosen)} and `rejected` {len(rejected)} completions; RM-Bench has three styles of each",
            "the order is concise, detailed, detailed with markdown",
        )
    return Item(prompts.prompt(row), chosen, rejected, _name(row, "domain" if "domain" in row.fields else "subset"))


def _judgebench(row: Row, prompts: PromptReader) -> Item:
    first, second = (text_of(row, name, row.fields[name]) for name in ("response_A", "response_B"))
    label = row.fields["label"]
    if label not in _LABELS:
        raise row.error(f"`label` is {shown(label)}; {' or '.join(_LABELS)} is expected")
    chosen, rejected = (first, second) if label == "A>B" else (second, first)
    return Item(text_of(row, "question", row.fields["question"]), (chosen,), (rejected,), _name(row, "source"))


_READERS = {
    "rewardbench": _rewardbench,
    "rewardbench-2": _rewardbench_2,
    "rm-bench": _rm_bench,
    "judgebench": _judgebench,
}


def _texts(row: Row, field: str) -> tuple[str, ...]:
    value = decoded_cell(row, field, row.fields[field])
    if not isinstance(value, list) or not value:
        raise row.error(f"`{field}` is {shown(value)}; a list of one or more completions is expected")
    return tuple(text_of(row, f"{field}[{number}]", text) for number, text in enumerate(value))


def _name(row: Row, field: str) -> str:
    if field not in row.fields:
        raise row.error(f"`{field}` is missing; it names the part of the benchmark", _SCHEMAS)
    return text_of(row, field, row.fields[field])
