"""Exports rankings as pairs of completions: TRL preferences (plain and conversational) and RewardBench rows.

A ranking of K completions without ties gives C(K, 2) pairs. Their `group` is the same for all rankings of these
completions of this prompt, by any annotator.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rlhf_cli.data.parsing.conversations import turns_of_transcript
from rlhf_cli.data.records import Message, Prompt, Ranking, prompt_text, prompt_to_json
from rlhf_cli.errors import UsageError
from rlhf_cli.labeling.aggregation import group_of
from rlhf_cli.labeling.exports.rows import Exported, Row, known


@dataclass(frozen=True)
class Pair:
    """Two completions of a ranking in different tiers."""

    ranking: Ranking
    chosen: str
    rejected: str


def pairs_of(ranking: Ranking) -> Iterator[Pair]:
    """All pairs of completions in different tiers, better tiers first; pairs with equal text are skipped."""
    for better, worse in itertools.combinations(ranking.tiers, 2):
        for chosen, rejected in itertools.product(better, worse):
            pair = Pair(ranking, ranking.completions[chosen], ranking.completions[rejected])
            if pair.chosen != pair.rejected:
                yield pair


def preferences(rankings: Sequence[Ranking]) -> Exported:
    """TRL's plain preferences: strings."""
    return _paired(
        rankings,
        lambda pair: {
            "prompt": _plain(pair.ranking.prompt, "preferences"),
            "chosen": pair.chosen,
            "rejected": pair.rejected,
        },
    )


def conversations(rankings: Sequence[Ranking]) -> Exported:
    """TRL's conversational preferences: lists of messages."""
    exported = _paired(rankings, _conversation)
    transcripts = sum(_turns(ranking.prompt) is not None for ranking in rankings)
    if transcripts:
        exported.lost.append(
            f"{transcripts:,} prompts are transcripts (`Human:`, `Assistant:`); white space around turns is removed"
        )
    return exported


def _conversation(pair: Pair) -> Row:
    prompt, chosen, rejected = pair.ranking.prompt, pair.chosen, pair.rejected
    if (turns := _turns(prompt)) is not None:
        prompt, chosen, rejected = turns, chosen.strip(), rejected.strip()
    return {
        "prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt_to_json(prompt),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _turns(prompt: Prompt) -> tuple[Message, ...] | None:
    return turns_of_transcript(prompt) if isinstance(prompt, str) else None


def rewardbench(rankings: Sequence[Ranking]) -> Exported:
    """Rows in RewardBench's format; the names of the models are unknown."""
    numbers = itertools.count()
    return _paired(
        rankings,
        lambda pair: {
            "id": next(numbers),
            "prompt": _plain(pair.ranking.prompt, "rewardbench"),
            "chosen": pair.chosen,
            "chosen_model": "",
            "rejected": pair.rejected,
            "rejected_model": "",
            "subset": "labels",
        },
    )


def _paired(rankings: Sequence[Ranking], row_of: Callable[[Pair], Row]) -> Exported:
    pairs = [pair for ranking in rankings for pair in pairs_of(ranking)]
    # TRL's trainer fails on a column with nulls: either all pairs have a margin, or none.
    margins = [_margin(pair) for pair in pairs]
    keeps_margin = None not in margins
    rows = [
        row_of(pair)
        | known(margin=margin if keeps_margin else None, group=group_of(pair.ranking), annotator=pair.ranking.annotator)
        for pair, margin in zip(pairs, margins, strict=True)
    ]
    return Exported(rows, is_array=False, lost=_lost_in_pairs(rankings, len(pairs), margins))


def _margin(pair: Pair) -> float | None:
    """The margin of a ranking of two completions; with more it says nothing about a single pair."""
    return pair.ranking.margin if len(pair.ranking.completions) == 2 else None


def _lost_in_pairs(rankings: Sequence[Ranking], pairs: int, margins: Sequence[float | None]) -> list[str]:
    lost = []
    possible = sum(len(ranking.completions) * (len(ranking.completions) - 1) // 2 for ranking in rankings)
    if possible > pairs:
        lost.append(
            f"{possible - pairs:,} of {possible:,} pairs are ties or have equal text, which preferences cannot express"
        )
    if empty := sum(next(pairs_of(ranking), None) is None for ranking in rankings):
        lost.append(f"{empty:,} of {len(rankings):,} rankings consist of one tie and give no pair")
    if (known := sum(margin is not None for margin in margins)) and known < len(margins):
        lost.append(
            f"{known:,} of {len(margins):,} pairs have a margin; TRL needs it in all rows or in none, so it is dropped"
        )
    return lost


def _plain(prompt: Prompt, format_: str) -> str:
    if isinstance(prompt, str) or (len(prompt) == 1 and prompt[0].role == "user"):
        return prompt_text(prompt)
    raise UsageError(
        f"`--format {format_}` holds prompts as text, but one is a conversation: {prompt_text(prompt)[:60]!r}",
        hint="use `--format conversations` or `--format rankings`",
    )
