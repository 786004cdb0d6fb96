"""Tasks as Label Studio exports them (JSON): `Ranker` over a `List`, `Pairwise`, `Choices` and `Rating`.

`Choices` name the best of similarly named fields (`answer1`), or a tie; a `Rating` belongs to the field it rates. The
tables of JSON-MIN and CSV are comparisons, see `comparisons`.

A ranker without buckets holds one list of ids under its own name, best first. With buckets, their names give the order:
`1`, `2`, `3` or `tier 1`, `tier 2`, best first; completions in one bucket are tied. Other names give no order, which
`data.columns={ranking: [best, ..., worst]}` does. `_` holds the items that were not moved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from rlhf_cli.data.formats.common import (
    UNRANKED,
    ImportOptions,
    Part,
    completion_names,
    new_row,
    objects_of,
    prompt_name,
)
from rlhf_cli.data.formats.verdicts import Verdict, by_numbers, by_winner, is_winner
from rlhf_cli.data.parsing.conversations import text_of
from rlhf_cli.data.parsing.fields import yaml_name
from rlhf_cli.data.readers.rows import Row, listed, shown
from rlhf_cli.data.skips import Skip

_BUCKET = re.compile(r"(?:(?:tier|rank|place|level)[-_ ]?)?(\d+)", re.IGNORECASE)
_CONTROLS = ("ranker", "pairwise")
_ONE_CONTROL = "export one control at a time"


def matches(fields: Mapping[str, object]) -> bool:
    """Whether a row is a task of Label Studio."""
    return isinstance(fields.get("data"), dict) and isinstance(fields.get("annotations"), list)


def convert(row: Row, options: ImportOptions) -> Iterator[Part]:
    """Yield one ranking per annotation; the completions alone if there is none and unranked ones are accepted."""
    data = row.fields["data"]
    assert isinstance(data, dict)
    options.warnings.add("label studio", row.location)
    count = 0
    for name, annotation in objects_of(row, "annotations", row.fields["annotations"]):
        if annotation.get("was_cancelled"):
            options.warnings.add("annotations not given", row.location)
            continue
        given = objects_of(row, f"{name}.result", annotation.get("result"))
        results = [(where, result) for where, result in given if result.get("type") in _CONTROLS]
        if not results and (verdict := _verdict_over_fields(row, data, name, [result for _, result in given])):
            count += 1
            yield _compared_fields(row, data, name, annotation, verdict, options)
            continue
        if not results:
            options.warnings.add("annotations not given", row.location)
            continue
        if len(results) > 1:
            controls = listed([str(result.get("from_name")) for _, result in results])
            raise row.error(
                f"`{name}` has {len(results)} rankings: {controls}",
                _ONE_CONTROL,
            )
        count += 1
        yield _annotation(row, data, name, annotation, *results[0], options)
    if not count:
        if options.unranked:
            prompt, ids = _list_of_items(row, data, None, options)
            yield new_row(row, "", {"prompt": prompt, "completions": list(ids.values())})
        else:
            options.warnings.add("tasks without", row.location)


def _annotation(
    row: Row,
    data: Mapping[str, object],
    name: str,
    annotation: Mapping[str, object],
    where: str,
    result: Mapping[str, object],
    options: ImportOptions,
) -> Part:
    value = result.get("value")
    if not isinstance(value, dict):
        raise row.error(f"`{where}.value` is {shown(value)}; an object is expected")
    fields: dict[str, object] = {"annotator": _annotator(annotation.get("completed_by"))}
    location = f" ({name})"
    if result["type"] == "pairwise":
        return new_row(row, location, fields | _pair(row, data, where, value, result, options))
    tiers = _tiers(row, f"{where}.value.ranker", value.get("ranker"), result.get("from_name"), _order(options))
    ranked = [identifier for tier in tiers for identifier in tier]
    prompt, ids = _list_of_items(row, data, ranked, options)
    for identifier in ranked:
        if identifier not in ids:
            raise row.error(
                f"`{where}.value.ranker` ranks {shown(identifier)}, and the task has the ids {listed(list(ids))}"
            )
    if len(ranked) < len(ids):
        if options.unranked or len(tiers) < 2:
            return Skip(f"{row.location}{location}", UNRANKED, row.excerpt())
        options.warnings.add("not placed", row.location, count=len(ids) - len(ranked))
        ids = {identifier: text for identifier, text in ids.items() if identifier in ranked}
    index = {identifier: number for number, identifier in enumerate(ids)}
    ranking = [[index[identifier] for identifier in tier] for tier in tiers]
    return new_row(row, location, fields | {"prompt": prompt, "completions": list(ids.values()), "ranking": ranking})


def _annotator(completed_by: object) -> object:
    """The annotator: an id, or an object with an e-mail address and an id."""
    if isinstance(completed_by, dict):
        return completed_by.get("email") or completed_by.get("id")
    return completed_by


# Choices and Rating


def _verdict_over_fields(
    row: Row, data: Mapping[str, object], name: str, results: Sequence[Mapping[str, object]]
) -> tuple[list[str], Verdict] | None:
    """The completions and the verdict that choices or ratings give; None if they are about something else."""
    rated: dict[str, object] = {}
    for result in results:
        field = str(result.get("to_name"))
        if result.get("type") != "rating" or field not in data:
            continue
        if field in rated:
            controls = [str(one.get("from_name")) for one in results if one.get("to_name") == result["to_name"]]
            raise row.error(f"`{name}` rates `{field}` more than once: {listed(controls)}", _ONE_CONTROL)
        rated[field] = _value(result, "rating")
    if len(rated) > 1:
        verdict = by_numbers(row, f"{name}.result", list(rated.values()), len(rated), highest_first=True)
        return None if verdict is None else (list(rated), verdict)
    fields = completion_names(data)
    choices = [_value(result, "choices") for result in results if result.get("type") == "choices"]
    winners = [value for value in choices if is_winner(value, fields)] if fields else []
    if len(winners) != 1:
        return None
    verdict = by_winner(row, f"{name}.result", winners[0], fields)
    return None if verdict is None else (fields, verdict)


def _value(result: Mapping[str, object], name: str) -> object:
    value = result.get("value")
    return value.get(name) if isinstance(value, dict) else None


def _compared_fields(
    row: Row,
    data: Mapping[str, object],
    name: str,
    annotation: Mapping[str, object],
    compared: tuple[list[str], Verdict],
    options: ImportOptions,
) -> Row:
    fields, verdict = compared
    ours: dict[str, object] = {
        "prompt": data[prompt_name(row, data, fields, options)],
        "completions": [text_of(row, f"data.{field}", data[field]) for field in fields],
        "ranking": verdict.tiers,
        "annotator": _annotator(annotation.get("completed_by")),
    }
    return new_row(row, f" ({name})", ours)


# Ranker


def _order(options: ImportOptions) -> list[str]:
    """The names of the buckets, best first, if the user gave them: `data.columns={ranking: [good, bad]}`."""
    given = options.columns.get("ranking", ())
    return [] if isinstance(given, str) else list(given)


def _tiers(row: Row, name: str, ranker: object, tag: object, order: Sequence[str]) -> list[list[str]]:
    """Tiers of ids.

    Args:
        row: for messages.
        name: of the value, for messages.
        ranker: ids by bucket.
        tag: name of the control, which is the key of the list if there are no buckets.
        order: names of the buckets, best first; empty if their own names say it.
    """
    hint = (
        'without buckets `{"rank": ["b", "a"]}`; with buckets named by number, best first, `{"1": ["b"], "2": ["a"]}`'
    )
    if isinstance(ranker, list):  # some versions wrote a list
        ranker = {"rank": ranker}
    if not isinstance(ranker, dict) or not all(isinstance(ids, list) for ids in ranker.values()):
        raise row.error(f"`{name}` is {shown(ranker)}; lists of ids are expected", hint)
    buckets = {str(key): [_id(row, name, value) for value in ids] for key, ids in ranker.items() if key != "_"}
    if order:
        if lacking := sorted(buckets.keys() - set(order)):
            raise row.error(
                f"`{name}` has the bucket `{lacking[0]}`, which `data.columns` does not list in `ranking`",
                _order_hint([*order, *lacking]),
            )
        return [buckets[bucket] for bucket in order if buckets.get(bucket)]
    only = next(iter(buckets)) if len(ranker) == 1 else None
    if only is not None and (only == tag or _numbered(only) is None):
        return [[identifier] for identifier in buckets[only]]
    numbers = {key: _numbered(key) for key in buckets}
    if None in numbers.values() or len(set(numbers.values())) < len(numbers):
        raise row.error(
            f"`{name}` has the buckets {listed(list(buckets))}, and which is best is not clear",
            _order_hint(list(buckets)),
        )
    return [ids for key, ids in sorted(buckets.items(), key=lambda item: numbers[item[0]] or 0) if ids]


def _order_hint(buckets: list[str]) -> str:
    names = ", ".join(map(yaml_name, buckets))
    return f"list them, best first: `--set 'data.columns={{ranking: [{names}]}}'`"


def _numbered(name: str) -> int | None:
    found = _BUCKET.fullmatch(name)
    return int(found[1]) if found else None


def _id(row: Row, name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise row.error(f"`{name}` holds {shown(value)}, which is not an id")
    return str(value)


def _list_of_items(
    row: Row, data: Mapping[str, object], ranked: Sequence[str] | None, options: ImportOptions
) -> tuple[object, dict[str, object]]:
    """The prompt, and the completions by id."""
    lists = {name: value for name, value in data.items() if _is_list_of_items(value)}
    found = {name: _items(row, f"data.{name}", value) for name, value in lists.items()}
    fitting = {name: ids for name, ids in found.items() if ranked is None or set(ranked) <= ids.keys()} or found
    if len(fitting) != 1:
        many = "several lists" if fitting else "no list"
        raise row.error(
            f"`data` has {many} of objects with an `id`: it has {listed(data)}",
            '`"items": [{"id": "a", "body": "one completion"}, ...]`, as the tag `List` shows them',
        )
    [ids] = fitting.values()
    return data[prompt_name(row, data, lists, options)], ids


def _is_list_of_items(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "id" in item for item in value)


def _items(row: Row, name: str, value: object) -> dict[str, object]:
    texts: dict[str, object] = {}
    for where, item in objects_of(row, name, value):
        identifier = _id(row, f"{where}.id", item["id"])
        if identifier in texts:
            raise row.error(f"`{name}` has the id {shown(identifier)} twice")
        field = "body" if "body" in item else "title"
        texts[identifier] = text_of(row, f"{where}.{field}", item.get(field))
    return texts


# Pairwise


def _pair(
    row: Row,
    data: Mapping[str, object],
    where: str,
    value: Mapping[str, object],
    result: Mapping[str, object],
    options: ImportOptions,
) -> dict[str, object]:
    selected = value.get("selected")
    if selected not in ("left", "right"):
        raise row.error(f"`{where}.value.selected` is {shown(selected)}; left or right is expected")
    # `toName` of the tag, if the export has it; tags may have other names than the data.
    named = [name.strip() for name in str(result.get("to_name", "")).split(",")]
    completions = named if len(named) == 2 and all(name in data for name in named) else completion_names(data)
    if len(completions) != 2:
        raise row.error(
            f"which two fields were compared is not clear: `data` has {listed(data)}",
            "name them alike, for example `answer1` and `answer2`, the left one first",
        )
    better, worse = completions if selected == "left" else reversed(completions)
    return {
        "prompt": data[prompt_name(row, data, completions, options)],
        "chosen": text_of(row, f"data.{better}", data[better]),
        "rejected": text_of(row, f"data.{worse}", data[worse]),
    }
