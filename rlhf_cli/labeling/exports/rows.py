"""Rows of an exported file, and their serialization."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_cli.data.records import Ranking, prompt_to_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Exported:
    """Rows of a file.

    Attributes:
        rows: JSON objects.
        is_array: write one JSON array; otherwise one object per line.
        lost: sentences that say what the format cannot hold.
    """

    rows: list[Row]
    is_array: bool
    lost: list[str]

    def text(self) -> Iterator[str]:
        """The content of the file, in pieces."""
        if not self.is_array:
            yield from (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
            return
        for number, row in enumerate(self.rows):
            yield ("[\n" if number == 0 else ",\n") + json.dumps(row, ensure_ascii=False)
        yield "\n]\n" if self.rows else "[]\n"


def ranking_to_json(ranking: Ranking) -> Row:
    """Convert to one object of `rankings.jsonl`; unknown values have no key."""
    row: Row = {
        "prompt": prompt_to_json(ranking.prompt),
        "completions": list(ranking.completions),
        "ranking": [list(tier) for tier in ranking.tiers],
    }
    return row | known(margin=ranking.margin, annotator=ranking.annotator)


def known(**fields: Any) -> Row:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}
