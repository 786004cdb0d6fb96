"""Parses judges' replies. Parsing is strict: an ambiguous reply counts as a failure."""

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
UNHEARD = "no reply to an attempt that may be billed"
"""Never a vote; stored for the cost the attempt may have caused."""

_MARK = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_LIST = re.compile(r"\[\[\s*([A-P](?:\s*[>=]\s*[A-P])+)\s*\]\]")


@dataclass(frozen=True)
class Reply:
    """Reply of a judge to one question.

    Attributes:
        text: text of an endpoint's reply.
        chances: probabilities of the letters A and B as the next token of a local model.
        failure: reason why there is nothing to parse; empty otherwise.
        prompt_tokens: of the question, as reported by the endpoint or counted by the tokenizer.
        completion_tokens: of the reply.
        cost: at the time of the request.
        is_estimated: the endpoint reported no usage; tokens and cost are upper bounds.
        is_cut: the reply was cut off at `max_new_tokens`.
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
        """Whether another attempt would give the same result, so that the reply is worth storing."""
        return self.failure not in (REFUSED, UNUSABLE, UNHEARD)

    def to_json(self) -> dict[str, Any]:
        """Convert for files."""
        return asdict(self)

    @staticmethod
    def from_json(plain: dict[str, Any]) -> Reply:
        """Parse the output of `to_json`; raises `TypeError` or `KeyError` for anything else."""
        chances = plain.pop("chances")
        return Reply(**plain, chances=None if chances is None else (float(chances[0]), float(chances[1])))


Levels = tuple[int, ...]
"""Tier of each completion in the order shown, 0 is best."""


def verdict(question: Question, reply: Reply) -> tuple[Levels | None, str]:
    """Return the tier of each completion shown, or None and the reason.

    The last non-blank line of a text decides if it holds exactly one mark or order; otherwise all marks of the text
    must agree. Everything before `</think>` is ignored.
    """
    if reply.failure:
        return None, reply.failure
    if reply.chances is not None:
        first, second = reply.chances
        return (int(first < second), int(second < first)), ""
    count = len(question.shown)
    text = reply.text.rpartition("</think>")[2]
    if "<think>" in text:  # truncated reasoning is not a verdict
        return None, CUT_OFF if reply.is_cut else NO_VERDICT
    lines = [line for line in text.splitlines() if line.strip()]
    found = (_all(lines[-1], count) or _all(text, count)) if lines else set()
    if len(found) == 1:
        return found.pop(), ""
    if found:
        return None, UNCLEAR
    return None, CUT_OFF if reply.is_cut else NO_VERDICT


def _all(text: str, count: int) -> set[Levels]:
    """All distinct verdicts in a text about `count` completions; a pair's may also be written as an order."""
    found = {_order(match, count) for match in _LIST.findall(text)}
    if count == 2:
        found |= {{"A": (0, 1), "B": (1, 0), "C": (0, 0)}[mark] for mark in _MARK.findall(text)}
    return {levels for levels in found if levels is not None}


def _order(text: str, count: int) -> Levels | None:
    """Tiers of an order such as `B > A = C`; None unless it holds every letter once."""
    levels: dict[str, int] = {}
    for level, tier in enumerate(text.split(">")):
        for letter in tier.split("="):
            if letter.strip() in levels:
                return None
            levels[letter.strip()] = level
    if set(levels) != set(LETTERS[:count]):
        return None
    return tuple(levels[letter] for letter in LETTERS[:count])
