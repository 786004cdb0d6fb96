"""Completions side by side, as a report shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.data.records import Message, prompt_text
from rlhf_cli.report.gather import RunFiles
from rlhf_cli.report.texts import Pieces, shortened, side_by_side
from rlhf_cli.report.verdict import first_pair

_LONGEST_PROMPT = 600


@dataclass(frozen=True)
class Side:
    """A completion of a sample."""

    label: str
    won: bool
    pieces: Pieces


@dataclass(frozen=True)
class Sample:
    """A prompt with the completions of both models."""

    winner: str
    why: str
    prompt: str
    sides: Sequence[Side]


def samples(run: RunFiles) -> list[Sample]:
    """Return the samples that are shown."""
    pair = first_pair(run)
    if pair is None:
        return []
    return [_sample(row, pair) for row in run.samples.rows]


def _sample(row: Mapping[str, Any], pair: Mapping[str, Any]) -> Sample:
    prompt, rest = shortened(_prompt(row["prompt"]), _LONGEST_PROMPT)
    pieces = side_by_side(row["baseline"], row["policy"])
    sides = [
        Side(f"{pair[side]}{_notes(row, side)}", row["winner"] == side, own)
        for side, own in zip(("baseline", "policy"), pieces, strict=True)
    ]
    return Sample(row["winner"], row["chosen_as"], f"{prompt}{rest}", sides)


def _prompt(plain: Any) -> str:
    if isinstance(plain, str):
        return plain
    return prompt_text(tuple(Message(turn["role"], turn["content"]) for turn in plain))


def _notes(row: Mapping[str, Any], side: str) -> str:
    """Return what follows the name of a model: whether it is preferred, its scores, and whether it was cut."""
    found = ["preferred"] if row["winner"] == side else []
    found += [f"{name} {row[f'{name}_{side}']:.2f}" for name in ("gold", "reward") if f"{name}_{side}" in row]
    found += [] if row.get(f"finished_{side}", True) else ["cut at the token limit"]
    return f" · {' · '.join(found)}" if found else ""


def samples_note(run: RunFiles) -> str:
    """Return which samples are shown, and what the colors mean."""
    shown, count = len(run.samples.rows), run.samples.of
    each = 1 if run.evaluation is None else run.evaluation["samples_per_prompt"]
    pairs = f"{count:,} pairs of completions" + (f", {each:,} per prompt" if each > 1 else "")
    which = (
        f"All {pairs}."
        if shown == count
        else f"{shown:,} of {pairs}: the largest gains and losses of the deciding score, and others at random."
    )
    return f"{which} Words that only the baseline wrote are marked in red, those that only the policy wrote in green."
