"""Noisy labels for proxies: pairs of completions in the gold reward's order, some of them swapped."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

from rlhf_cli.data.records import Prompt, Ranking, prompt_to_json
from rlhf_cli.data.splits import Split
from rlhf_cli.errors import DataError
from rlhf_cli.files import write_whole

_HELD_OUT_PAIRS = 4
"""Pairs per held-out prompt, on which `train-rm` measures the accuracy of every proxy."""


@dataclass(frozen=True)
class Pair:
    """A label: of two completions of a prompt, the one that is preferred."""

    prompt: Prompt
    chosen: str
    rejected: str

    def swapped(self) -> Pair:
        """Return the opposite label."""
        return Pair(self.prompt, self.rejected, self.chosen)

    def to_json(self) -> dict[str, Any]:
        """Return the record that `train-rm` reads."""
        return {"prompt": prompt_to_json(self.prompt), "chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True)
class LabelPool:
    """All pairs that proxies can be trained and measured on.

    Attributes:
        training: per training prompt, its pairs.
        held_out: pairs of held-out prompts, without noise.
    """

    training: Sequence[Sequence[Pair]]
    held_out: Sequence[Pair]

    @staticmethod
    def of(rankings: Sequence[Ranking], split: Split) -> LabelPool:
        """Return the pairs of rankings, without ties, equal and blank completions."""
        training: list[list[Pair]] = []
        held_out: list[Pair] = []
        for ranking in rankings:
            pairs = _pairs(ranking)
            if split.holds_out(ranking.prompt):
                held_out += random.Random(split.seed).sample(pairs, min(_HELD_OUT_PAIRS, len(pairs)))
            else:
                training.append(pairs)
        return LabelPool(training, held_out)

    def draw(self, count: int, *, noise: float, seed: int) -> list[Pair]:
        """Draw labels of as many prompts as possible. Draws of one seed contain one another.

        Args:
            count: number of labels.
            noise: share of them that is swapped, in expectation. Labels swapped at little noise are swapped at more.
            seed: of the choice and of the noise.

        Raises:
            DataError: there are too few pairs.
        """
        available = sum(map(len, self.training))
        if count > available:
            raise DataError(
                f"the largest proxy needs {count:,} labels; the training prompts have {available:,} pairs without ties",
                hint="lower `overopt.labels` or `overopt.multiples`, give more prompts, or raise "
                "`label.completions_per_prompt`",
            )
        generator = random.Random(seed)
        queues = [generator.sample(pairs, len(pairs)) for pairs in self.training]
        generator.shuffle(queues)
        in_turns = [pair for turn in zip_longest(*queues) for pair in turn if pair is not None]
        luck = [generator.random() for _ in in_turns]
        return [
            pair.swapped() if number < noise else pair for pair, number in zip(in_turns[:count], luck, strict=False)
        ]

    def write(self, path: Path, labels: Sequence[Pair]) -> None:
        """Write labels and the pairs of held-out prompts."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(pair.to_json(), ensure_ascii=False) + "\n" for pair in (*labels, *self.held_out)]
        write_whole(path, "".join(lines))


def _pairs(ranking: Ranking) -> list[Pair]:
    levels, texts = ranking.levels(), ranking.completions
    found: dict[tuple[str, str], Pair] = {}
    for a, b in combinations(range(len(texts)), 2):
        better, worse = (a, b) if levels[a] < levels[b] else (b, a)
        if levels[a] != levels[b] and texts[a].strip() and texts[b].strip() and texts[a] != texts[b]:
            found.setdefault((texts[better], texts[worse]), Pair(ranking.prompt, texts[better], texts[worse]))
    return list(found.values())
