"""The first ranked questions of the sample data as other tools would write them; `make.py` calls it.

Plain Python and written by hand for each form, on purpose: that `rlhf` reads these files is a test of its readers that
does not lean on its writers. Two people, Ada and Ben, ranked; Ben sees the two best tiers the other way round.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

Ranked = dict[str, Any]
"""`prompt`, `completions` and `ranking`, as in rankings.jsonl."""
Tiers = list[list[int]]
COUNT = 6
PEOPLE = ("ada@example.org", "ben@example.org")


def make_formats(rankings: list[Ranked], follow_ups: list[Ranked]) -> dict[str, str]:
    """Name -> content; `follow_ups` are asked after the best answers to `rankings`."""
    rankings, follow_ups = rankings[:COUNT], follow_ups[:COUNT]
    strict = [row | {"ranking": [[index] for index in _flat(row["ranking"])]} for row in rankings]
    return {
        "formats/candidates.jsonl": _lines(
            [{name: row[name] for name in ("prompt", "completions")} for row in rankings]
        ),
        "formats/trl_conversations.jsonl": _lines(map(_trl, rankings)),
        "formats/hh.jsonl": _lines(map(_transcripts, rankings, follow_ups)),
        "formats/rewardbench.jsonl": _lines(_rewardbench(number, row) for number, row in enumerate(rankings)),
        "formats/rewardbench2.jsonl": _lines(_best_of_n(number, row) for number, row in enumerate(rankings)),
        "formats/openassistant_trees.jsonl": _lines(map(_tree, rankings, follow_ups)),
        "formats/label_studio.json": _array(_task(row, buckets=False) for row in strict),
        "formats/label_studio_buckets.json": _array(_task(row, buckets=True) for row in rankings),
        "formats/label_studio_pairs.json": _array(map(_pair_task, rankings)),
        "formats/argilla.json": _array(map(_record, rankings)),
        "formats/labels.jsonl": _lines(label for row in rankings for label in _labels(row)),
    }


def _flat(tiers: list[list[Any]]) -> list[Any]:
    return [one for tier in tiers for one in tier]


def _of_ben(tiers: Tiers) -> Tiers:
    return [*reversed(tiers[:2]), *tiers[2:]]


def _best(row: Ranked) -> str:
    return row["completions"][row["ranking"][0][0]]


def _worst(row: Ranked) -> str:
    return row["completions"][row["ranking"][-1][-1]]


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _trl(row: Ranked) -> Ranked:
    return {
        "prompt": [_turn("user", row["prompt"])],
        "chosen": [_turn("assistant", _best(row))],
        "rejected": [_turn("assistant", _worst(row))],
    }


def _transcripts(row: Ranked, follow_up: Ranked) -> Ranked:
    before = f"\n\nHuman: {row['prompt']}\n\nAssistant: {_best(row)}\n\nHuman: {follow_up['prompt']}\n\nAssistant: "
    return {"chosen": before + _best(follow_up), "rejected": before + _worst(follow_up)}


def _rewardbench(number: int, row: Ranked) -> Ranked:
    pair = {"chosen": _best(row), "chosen_model": "kind", "rejected": _worst(row), "rejected_model": "rude"}
    return {"prompt": row["prompt"], **pair, "subset": "everyday", "id": number}


def _best_of_n(number: int, row: Ranked) -> Ranked:
    best, *others = row["ranking"]
    chosen, rejected = ([row["completions"][index] for index in tier] for tier in (best, _flat(others)))
    counts = {"num_correct": len(chosen), "num_rejected": len(rejected), "total_completions": len(row["completions"])}
    # The score of ties compares a prompt with several good completions with one that has a single good one.
    name, subset = {0: ("tied:0", "Ties"), 1: ("ref:0", "Ties")}.get(number, (str(number), "Everyday"))
    return {"id": name, "prompt": row["prompt"], "chosen": chosen, "rejected": rejected, **counts} | {
        "models": ["sample"] * len(row["completions"]),
        "subset": subset,
    }


def _tree(row: Ranked, follow_up: Ranked) -> Ranked:
    """Ranked replies, one that was deleted, and under the best reply another question with ranked replies."""
    root = _message(row["prompt"], "prompter", row["prompt"])
    root["replies"] = [_reply(row, index, rank) for rank, index in enumerate(_flat(row["ranking"]))]
    root["replies"].append(_message("deleted" + row["prompt"], "assistant", "Buy my book.") | {"deleted": True})
    second = _message(row["prompt"] + follow_up["prompt"], "prompter", follow_up["prompt"])
    second["replies"] = [_reply(follow_up, index, rank) for rank, index in enumerate(_flat(follow_up["ranking"]))]
    root["replies"][0]["replies"] = [second]
    return {"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root}


def _message(seed: str, role: str, text: str) -> Ranked:
    digest = hashlib.sha256(f"{role} {seed}".encode()).hexdigest()
    identifier = "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32]))
    state = {"lang": "en", "review_count": 3, "review_result": True, "deleted": False, "synthetic": False}
    return {"message_id": identifier, "text": text, "role": role, **state, "replies": []}


def _reply(row: Ranked, index: int, rank: int) -> Ranked:
    text = row["completions"][index]
    return _message(row["prompt"] + text, "assistant", text) | {"rank": rank}


def _task(row: Ranked, *, buckets: bool) -> Ranked:
    items = [{"id": f"answer_{n}", "title": f"Answer {n}", "body": text} for n, text in enumerate(row["completions"])]

    def annotation(person: str, tiers: Tiers) -> Ranked:
        ids = [[items[index]["id"] for index in tier] for tier in tiers]
        ranker: Any = {f"tier {place}": tier for place, tier in enumerate(ids, 1)} | {"_": []}
        if not buckets:
            ranker = {"rank": _flat(ids)}
        result = {"from_name": "rank", "to_name": "answers", "type": "ranker", "value": {"ranker": ranker}}
        user = {"id": PEOPLE.index(person) + 1, "email": person}
        return {"completed_by": user, "was_cancelled": False, "result": [result]}

    given = [annotation(PEOPLE[0], row["ranking"]), annotation(PEOPLE[1], _of_ben(row["ranking"]))]
    return {"data": {"prompt": row["prompt"], "items": items}, "annotations": given, "predictions": []}


def _pair_task(row: Ranked) -> Ranked:
    """Two answers side by side; the better one is on the right."""
    result = {"from_name": "better", "to_name": "left,right", "type": "pairwise", "value": {"selected": "right"}}
    data = {"prompt": row["prompt"], "answer1": _worst(row), "answer2": _best(row)}
    return {"data": data, "annotations": [{"completed_by": 1, "was_cancelled": False, "result": [result]}]}


def _record(row: Ranked) -> Ranked:
    fields = {"prompt": row["prompt"]} | {f"response-{n}": text for n, text in enumerate(row["completions"], 1)}

    def response(person: str, tiers: Tiers) -> Ranked:
        ranks = [{"value": f"response-{i + 1}", "rank": rank} for rank, tier in enumerate(tiers, 1) for i in tier]
        return {"value": ranks, "user_id": person}

    given = [response(PEOPLE[0], row["ranking"]), response(PEOPLE[1], _of_ben(row["ranking"]))]
    others = {"metadata": {}, "suggestions": {}, "vectors": {}, "status": "completed"}
    return {"id": _hash(row), "fields": fields, "responses": {"ranking": given}, **others}


def _labels(row: Ranked) -> list[Ranked]:
    """Ada ranks, and again without knowing it; Ben ranks, and passes over questions about bread."""
    order = list(range(len(row["completions"])))
    common = {"item": _hash(row), "prompt": row["prompt"], "completions": row["completions"]}

    def label(person: str, tiers: Tiers, purpose: str = "label", **others: Any) -> Ranked:
        shown = order if person == PEOPLE[0] and purpose == "label" else order[::-1]
        known = {"outcome": "ranked", "ranking": tiers, "shown": shown, "purpose": purpose, "known": None}
        rest = {"strength": None, "marks": {}, "note": "", "reason": "", "active_seconds": 30.5}
        when = {"at": "2026-01-05T09:00:00.000Z", "guidelines": None}
        return common | {"annotator": person} | known | rest | when | others

    skipped = {"outcome": "skipped", "reason": "I know nothing about bread"}
    is_skipped = "bread" in row["prompt"]
    return [
        label(PEOPLE[0], row["ranking"]),
        label(PEOPLE[0], row["ranking"], "repeat"),
        label(PEOPLE[1], [] if is_skipped else _of_ben(row["ranking"]), **(skipped if is_skipped else {})),
    ]


def _hash(row: Ranked) -> str:
    text = json.dumps([row["prompt"], sorted(row["completions"])], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _array(rows: Any) -> str:
    return json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n"
