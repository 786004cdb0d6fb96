"""What came back for a question, and the verdict in it: read strictly, so that what is unclear counts as a failure."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_cli.labeling.judges.questions import LETTERS, Question

NO_VERDICT = "no verdict in the reply"
CUT_OFF = "cut off before the verdict"
UNCLEAR = "more than one verdict in the reply"
TOO_LONG = "longer than the judge reads"
REFUSED = "refused by the endpoint"
UNUSABLE = "no chat completion in the response"
UNHEARD = "no answer to an attempt that may be billed"
"""Never a vote: it stands in the cache for what the attempt may have cost."""

_MARK = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_LIST = re.compile(r"\[\[\s*([A-P](?:\s*[>=]\s*[A-P])+)\s*\]\]")


@dataclass(frozen=True)
class Reply:
    """What a judge gave for one question.

    Attributes:
        text: what an endpoint wrote.
        chances: a local model's probabilities of the letters A and B as the next token.
        failure: why there is nothing to read; empty where there is.
        prompt_tokens: tokens of the question, as the endpoint counted or the tokenizer made.
        completion_tokens: tokens of the reply.
        cost: what it cost when it was asked.
        is_estimated: the endpoint did not say what it used; tokens and cost are upper bounds.
        is_cut: the reply ran into `max_new_tokens`.
    """

    text: str = ""
    chances: tuple[float, float] | None = None
    failure: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    is_estimated: bool = False
    is_cut: bool = False

    @property
    def is_final(self) -> bool:
        """Whether asking again would give the same, so that it is worth keeping."""
        return self.failure not in (REFUSED, UNUSABLE, UNHEARD)

    def to_json(self) -> dict[str, Any]:
        """As it stands in files."""
        return asdict(self)

    @staticmethod
    def from_json(plain: dict[str, Any]) -> Reply:
        """What `to_json` gave; raises `TypeError` or `KeyError` for anything else."""
        chances = plain.pop("chances")
        return Reply(**plain, chances=None if chances is None else (float(chances[0]), float(chances[1])))


Levels = tuple[int, ...]
"""Tier of each answer in the order they were shown, 0 the best."""


def verdict(question: Question, reply: Reply) -> tuple[Levels | None, str]:
    """The tier of each answer shown, or None and why there is none.

    Of a text, the last line that is not blank decides, if it holds one mark or order; where it holds none, all marks of
    the text have to agree. What stands before `</think>` is passed over.
    """
    if reply.failure:
        return None, reply.failure
    if reply.chances is not None:
        first, second = reply.chances
        return (int(first < second), int(second < first)), ""
    count = len(question.shown)
    text = reply.text.rpartition("</think>")[2]
    if "<think>" in text:  # thoughts that were cut off may weigh either
        return None, CUT_OFF if reply.is_cut else NO_VERDICT
    lines = [line for line in text.splitlines() if line.strip()]
    found = (_all(lines[-1], count) or _all(text, count)) if lines else set()
    if len(found) == 1:
        return found.pop(), ""
    if found:
        return None, UNCLEAR
    return None, CUT_OFF if reply.is_cut else NO_VERDICT


def _all(text: str, count: int) -> set[Levels]:
    """Every distinct verdict in a text about `count` answers; a pair's may also be written as an order."""
    found = {_order(match, count) for match in _LIST.findall(text)}
    if count == 2:
        found |= {{"A": (0, 1), "B": (1, 0), "C": (0, 0)}[mark] for mark in _MARK.findall(text)}
    return {levels for levels in found if levels is not None}


def _order(text: str, count: int) -> Levels | None:
    """Tiers of an order such as `B > A = C`; None unless every letter stands there once."""
    levels: dict[str, int] = {}
    for level, tier in enumerate(text.split(">")):
        for letter in tier.split("="):
            if letter.strip() in levels:
                return None
            levels[letter.strip()] = level
    if set(levels) != set(LETTERS[:count]):
        return None
    return tuple(levels[letter] for letter in LETTERS[:count])
