"""Records as Argilla exports them: `RankingQuestion` over fields that hold the answers.

Read are Argilla 2's records (`to_json`, `to_list`), flattened or not and so as data sets of the hub have them, and
Argilla 1's feedback records. A ranking is a list of `{"value": name, "rank": 1}`, where equal ranks are a tie, or a
list of names, best first; a name is that of a field (`response-1`, also written `response_1` or `Response 1`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from rlhf_cli.data.conversations import text_of
from rlhf_cli.data.formats.common import (
    UNRANKED,
    Part,
    Wanted,
    answer_names,
    each,
    part,
    prompt_name,
    tiers_by_rank,
)
from rlhf_cli.data.rows import Row, listed, printable, shown
from rlhf_cli.data.skips import Skip

_RESPONSES = ".responses"
_Response = tuple[str, object, object]
"""Its question, its value, and who gave it."""


def is_it(fields: Mapping[str, object]) -> bool:
    """Whether a row is a record."""
    if isinstance(fields.get("fields"), dict) and isinstance(fields.get("responses"), dict | list):
        return True
    return any(name.endswith(_RESPONSES) and f"{name}.users" in fields for name in fields)


def parts(row: Row, wanted: Wanted) -> Iterator[Part]:
    """A ranking for each user's response; the answers alone where there is none and they are wanted."""
    nested = row.fields.get("fields")
    fields = nested if isinstance(nested, dict) else _unflattened(row.fields)
    wanted.remarks.add("argilla", row.place)
    names = {_plain(name): name for name in fields}
    rankings = [
        (question, value, user) for question, value, user in _responses(row, wanted) if _is_ranking(value, names)
    ]
    questions = list(dict.fromkeys(question for question, _, _ in rankings))
    if len(questions) > 1 and (asked := wanted.columns.get("ranking")) in questions:
        rankings, questions = [one for one in rankings if one[0] == asked], [asked]
    if len(questions) > 1:
        raise row.error(
            f"two questions are rankings: {listed(questions)}", "name one: `--set 'data.columns={ranking: NAME}'`"
        )
    for number, (question, value, user) in enumerate(rankings):
        yield _ranking(
            row, fields, names, (f" ({printable(question)[:40]}, response {number + 1})", value, user), wanted
        )
    if rankings:
        return
    if not wanted.unranked:
        wanted.remarks.add("records without", row.place)
    else:
        answers = answer_names(fields)
        if not answers:
            raise row.error(
                f"which fields are the answers is not clear: there are {listed(fields)}",
                "name them alike, such as `response-1` and `response-2`",
            )
        prompt = fields[prompt_name(row, fields, answers, wanted)]
        yield part(row, "", {"prompt": prompt, "completions": [_answer(row, fields, name) for name in answers]})


def _ranking(
    row: Row,
    fields: Mapping[str, object],
    names: Mapping[str, str],
    response: tuple[str, object, object],
    wanted: Wanted,
) -> Part:
    where, value, user = response
    assert isinstance(value, list)
    members: Sequence[tuple[str, object]] = [
        (item, None) if isinstance(item, str) else (str(item["value"]), item.get("rank")) for item in value
    ]
    answers = [names[_plain(name)] for name, _ in members]
    if len(set(answers)) < len(answers):
        raise row.error(f"{where.strip()} ranks the same field twice: {shown(value)}")
    ranks = [rank for _, rank in members]
    if all(rank is None for rank in ranks):
        ranks = list(range(len(ranks)))  # names alone: best first
    if None in ranks or set(answers) < set(answer_names(fields)):
        return Skip(f"{row.place}{where}", UNRANKED, row.excerpt())
    if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
        raise row.error(f"{where.strip()} has a rank that is no whole number: {shown(value)}")
    order = sorted(range(len(answers)), key=lambda index: list(fields).index(answers[index]))
    tiers = tiers_by_rank([ranks[index] for index in order])  # type: ignore[misc]
    return part(
        row,
        where,
        {
            "prompt": fields[prompt_name(row, fields, answers, wanted)],
            "completions": [_answer(row, fields, answers[index]) for index in order],
            "ranking": tiers,
            "annotator": None if user in ("", "None") else user,  # Argilla 2 writes the user of nobody so
        },
    )


def _answer(row: Row, fields: Mapping[str, object], name: str) -> str:
    return text_of(row, f"fields.{name}", fields[name])


def _unflattened(columns: Mapping[str, object]) -> dict[str, object]:
    """The fields among the columns of a flattened record; Argilla gives its own columns these names, or a dot."""
    own = ("id", "_server_id", "status")
    return {name: value for name, value in columns.items() if name not in own and "." not in name}


def _responses(row: Row, wanted: Wanted) -> Iterator[_Response]:
    """All responses that were submitted."""
    for question, value, user, status in _all_responses(row):
        if status in ("draft", "discarded"):
            wanted.remarks.add("responses not submitted", row.place)
        else:
            yield question, value, user


def _all_responses(row: Row) -> Iterator[tuple[str, object, object, object]]:
    responses = row.fields.get("responses")
    if isinstance(responses, dict):  # Argilla 2
        for question, given in responses.items():
            for _, response in each(row, f"responses.{question}", given):
                yield question, response.get("value"), response.get("user_id"), response.get("status")
    elif isinstance(responses, list):  # Argilla 1
        for name, response in each(row, "responses", responses):
            values = response.get("values") or {}
            if not isinstance(values, dict):
                raise row.error(f"`{name}.values` is {shown(values)}; an object is expected")
            for question, answer in values.items():
                value = answer.get("value") if isinstance(answer, dict) else answer
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
    """Whether a response orders answers: other questions have other values, or choose labels that are no fields."""
    if not isinstance(value, list) or len(value) < 2:
        return False
    chosen = [item.get("value") if isinstance(item, dict) else item for item in value]
    return all(isinstance(name, str) and _plain(name) in names for name in chosen)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
