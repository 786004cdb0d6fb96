"""Simulated annotators with known habits, for tests of the statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from rlhf_cli.labeling.label_records import LabelRecord

BEGIN = datetime(2026, 3, 2, 9, tzinfo=UTC)


@dataclass(frozen=True)
class Person:
    """How somebody labels.

    Attributes:
        name: theirs.
        noise: spread of their mistakes; the completions' merits have spread 1.
        first: added to the merit of a completion for each place it is shown earlier.
        longer: added for each hundred characters.
        tie: merits nearer than this are a tie.
        seconds: median time of a label.
    """

    name: str
    noise: float = 0.6
    first: float = 0.0
    longer: float = 0.0
    tie: float = 0.0
    seconds: float = 60.0


def label(item: str, annotator: str, *tiers: int | tuple[int, ...], **more) -> LabelRecord:
    """A ranking of as many completions as `tiers` hold, each of ten characters for every place in the item."""
    as_tuples = tuple(tier if isinstance(tier, tuple) else (tier,) for tier in tiers)
    completions = sum(map(len, as_tuples))
    texts = tuple(f"{index}" * 10 * (index + 1) for index in range(completions))
    return LabelRecord(item, f"prompt {item}", texts, annotator, tiers=as_tuples, **more)


def crowd(
    people: Sequence[Person],
    *,
    items: int,
    overlap: int = 2,
    completions: int = 4,
    repeats: float = 0.05,
    gold: int = 0,
    seed: int = 0,
) -> list[LabelRecord]:
    """Labels of `items` items, each by `overlap` people, with a share of repeats and some gold items for everybody."""
    draw = np.random.default_rng(seed)
    labels: list[LabelRecord] = []
    clock = dict.fromkeys((person.name for person in people), BEGIN)

    def give(person: Person, name: str, merit: np.ndarray, lengths: np.ndarray, **more) -> None:
        shown = draw.permutation(completions)
        place = np.argsort(shown)
        seen = merit + draw.normal(0, person.noise, completions) - person.first * place + person.longer * lengths / 100
        order = np.argsort(-seen)
        tiers: list[list[int]] = [[int(order[0])]]
        for index in order[1:].tolist():
            if seen[tiers[-1][0]] - seen[index] < person.tie:
                tiers[-1].append(index)
            else:
                tiers.append([index])
        seconds = float(person.seconds * draw.lognormal(0, 0.4))
        clock[person.name] += timedelta(seconds=seconds)
        labels.append(
            LabelRecord(
                item=name,
                prompt=f"question {name}",
                completions=tuple(f"{index}{'x' * int(size)}" for index, size in enumerate(lengths)),
                annotator=person.name,
                tiers=tuple(tuple(sorted(tier)) for tier in tiers),
                shown=tuple(shown.tolist()),
                active_seconds=round(seconds, 2),
                at=clock[person.name].isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                **more,
            )
        )

    for number in range(items):
        merit, lengths = draw.normal(size=completions), draw.integers(100, 400, size=completions)
        for turn in range(overlap):
            person = people[(number + turn) % len(people)]
            give(person, f"i{number}", merit, lengths)
            if draw.random() < repeats:
                give(person, f"i{number}", merit, lengths, purpose="repeat")
    for number in range(gold):
        merit, lengths = np.linspace(4, -4, completions), draw.integers(100, 400, size=completions)
        known = tuple((index,) for index in range(completions))
        for person in people:
            give(person, f"g{number}", merit, lengths, purpose="gold", known=known)
    return labels
