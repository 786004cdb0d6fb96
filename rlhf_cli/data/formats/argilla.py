"""Records as Argilla exports them: `RankingQuestion` over fields that hold the completions.

It reads records of Argilla 2 (`to_json`, `to_list`), flattened or nested as in data sets of the hub, and feedback
records of Argilla 1. A ranking is a list of `{"value": name, "rank": 1}`, where equal ranks are a tie, or a list of
names, best first. Each name is the name of a field (`response-1`, also written `response_1` or `Response 1`), its
number or its letter. Without a ranking, ratings of the fields (`rating-1`) or a question that names the best are read.
"""

from __future__ import annotations

import itertools
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
    tiers_by_rank,
)
from rlhf_cli.data.formats.verdicts import Verdict, aliases, by_numbers, by_winner, is_winner
from rlhf_cli.data.parsing.conversations import text_of
from rlhf_cli.data.readers.rows import Row, listed, printable, shown
from rlhf_cli.data.skips import Skip

_RESPONSES = ".responses"
_Response = tuple[str, object, object]
"""Question, value, and user who responded."""


def matches(fields: Mapping[str, object]) -> bool:
    """Whether a row is a record of Argilla."""
    if isinstance(fields.get("fields"), dict) and isinstance(fields.get("responses"), dict | list):
        return True
    return any(name.endswith(_RESPONSES) and f"{name}.users" in fields for name in fields)


def convert(row: Row, options: ImportOptions) -> Iterator[Part]:
    """Yield one ranking per response; the completions alone if there is none and unranked ones are accepted."""
    nested = row.fields.get("fields")
    fields = nested if isinstance(nested, dict) else _fields_of_flat_record(row.fields)
    options.warnings.add("argilla", row.location)
    compared = completion_names(fields)
    names = {alias: compared[index] for alias, index in aliases(compared).items()} if compared else {}
    names |= {_plain(name): name for name in fields}
    responses = list(_responses(row, options))
    rankings = [(question, value, user) for question, value, user in responses if _is_ranking(value, names)]
    questions = list(dict.fromkeys(question for question, _, _ in rankings))
    named = options.columns.get("ranking")
    if len(questions) > 1 and isinstance(named, str) and named in questions:
        rankings, questions = [one for one in rankings if one[0] == named], [named]
    if len(questions) > 1:
        raise row.error(
            f"two questions are rankings: {listed(questions)}", "name one: `--set 'data.columns={ranking: NAME}'`"
        )
    for number, (question, value, user) in enumerate(rankings):
        yield _ranking(
            row, fields, names, (f" ({printable(question)[:40]}, response {number + 1})", value, user), options
        )
    others = [] if rankings else list(_other_verdicts(row, compared, responses))
    for number, (verdict, user) in enumerate(others, start=1):
        ours = _compared(row, fields, compared, user, options) | {"ranking": verdict.tiers}
        yield new_row(row, f" (response {number})", ours)
    if rankings or others:
        return
    if not options.unranked:
        options.warnings.add("records without", row.location)
    else:
        if not compared:
            raise row.error(
                f"which fields hold the completions is not clear: there are {listed(fields)}",
                "name them alike, for example `response-1` and `response-2`",
            )
        yield new_row(row, "", _compared(row, fields, compared, None, options))


def _other_verdicts(
    row: Row, compared: Sequence[str], responses: Sequence[_Response]
) -> Iterator[tuple[Verdict, object]]:
    """What each user said of the completions without ranking them: a rating of each, or which is best."""
    known = aliases(compared) if compared else {}
    for user in dict.fromkeys(str(user) for _, _, user in responses):
        own = [(question, value) for question, value, of in responses if str(of) == user]
        ratings: dict[int, object] = {}
        for question, value in own:
            end = re.search(r"(\d+|(?<=[-_ ])[a-z])$", question.lower())
            if end and end[1] in known and isinstance(value, int | float) and not isinstance(value, bool):
                ratings[known[end[1]]] = value
        winners = [value for _, value in own if is_winner(value, compared)] if compared else []
        verdict = None
        if len(ratings) == len(compared) > 1:
            numbers = [ratings[index] for index in range(len(compared))]
            verdict = by_numbers(row, "responses", numbers, len(compared), highest_first=True)
        elif len(winners) == 1:
            verdict = by_winner(row, "responses", winners[0], compared)
        if verdict is not None:
            yield verdict, user


def _compared(
    row: Row, fields: Mapping[str, object], compared: Sequence[str], user: object, options: ImportOptions
) -> dict[str, object]:
    return {
        "prompt": fields[prompt_name(row, fields, compared, options)],
        "completions": [_completion(row, fields, name) for name in compared],
        "annotator": None if user in ("", "None") else user,
    }


def _ranking(
    row: Row,
    fields: Mapping[str, object],
    names: Mapping[str, str],
    response: tuple[str, object, object],
    options: ImportOptions,
) -> Part:
    where, value, user = response
    assert isinstance(value, list)
    members: Sequence[tuple[str, object]] = [
        (item, None) if isinstance(item, str) else (str(item["value"]), item.get("rank")) for item in value
    ]
    completions = [names[_plain(name)] for name, _ in members]
    if len(set(completions)) < len(completions):
        raise row.error(f"{where.strip()} ranks the same field twice: {shown(value)}")
    ranks = [rank for _, rank in members]
    if all(rank is None for rank in ranks):
        ranks = list(range(len(ranks)))  # names alone: best first
    if None in ranks or set(completions) < set(completion_names(fields)):
        return Skip(f"{row.location}{where}", UNRANKED, row.excerpt())
    if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
        raise row.error(f"{where.strip()} has a rank that is not a whole number: {shown(value)}")
    order = sorted(range(len(completions)), key=lambda index: list(fields).index(completions[index]))
    tiers = tiers_by_rank([ranks[index] for index in order])  # type: ignore[misc]
    return new_row(
        row,
        where,
        {
            "prompt": fields[prompt_name(row, fields, completions, options)],
            "completions": [_completion(row, fields, completions[index]) for index in order],
            "ranking": tiers,
            "annotator": None if user in ("", "None") else user,  # how Argilla 2 writes a missing user
        },
    )


def _completion(row: Row, fields: Mapping[str, object], name: str) -> str:
    return text_of(row, f"fields.{name}", fields[name])


def _fields_of_flat_record(columns: Mapping[str, object]) -> dict[str, object]:
    """The fields of a flattened record; Argilla's own columns have these names or a dot in their name."""
    own = ("id", "_server_id", "status")
    return {name: value for name, value in columns.items() if name not in own and "." not in name}


def _responses(row: Row, options: ImportOptions) -> Iterator[_Response]:
    """Yield the submitted responses."""
    for question, value, user, status in _all_responses(row):
        if status in ("draft", "discarded"):
            options.warnings.add("responses not submitted", row.location)
        else:
            yield question, value, user


def _all_responses(row: Row) -> Iterator[tuple[str, object, object, object]]:
    responses = row.fields.get("responses")
    if isinstance(responses, dict):  # Argilla 2
        for question, given in responses.items():
            for _, response in objects_of(row, f"responses.{question}", given):
                yield question, response.get("value"), response.get("user_id"), response.get("status")
    elif isinstance(responses, list):  # Argilla 1
        for name, response in objects_of(row, "responses", responses):
            values = response.get("values") or {}
            if not isinstance(values, dict):
                raise row.error(f"`{name}.values` is {shown(values)}; an object is expected")
            for question, completion in values.items():
                value = completion.get("value") if isinstance(completion, dict) else completion
                yield question, value, response.get("user_id"), response.get("status")
    else:
        for name, values in row.fields.items():
            if name.endswith(_RESPONSES) and isinstance(values, list):
                users, states = (row.fields.get(f"{name}.{what}") or () for what in ("users", "status"))
                assert isinstance(users, Sequence)
                assert isinstance(states, Sequence)
                for value, user, state in itertools.zip_longest(values, users[: len(values)], states[: len(values)]):
                    yield name.removesuffix(_RESPONSES), value, user, state


def _is_ranking(value: object, names: Mapping[str, str]) -> bool:
    """Whether a response ranks fields: other questions have other values, or choose labels that are not fields."""
    if not isinstance(value, list) or len(value) < 2:
        return False
    chosen = [item.get("value") if isinstance(item, dict) else item for item in value]
    return all(isinstance(name, str) and _plain(name) in names for name in chosen)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
