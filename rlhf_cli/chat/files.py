"""What a chat keeps: a transcript, and rankings of replies in the form that `train-rm` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_cli.data.records import Ranking
from rlhf_cli.errors import DiskError
from rlhf_cli.labeling.exports.rows import ranking_to_json

RANKINGS = "rankings.jsonl"


@dataclass(frozen=True)
class ChatFiles:
    """Files of a chat; each line is on disk before the next turn.

    Attributes:
        transcript: file of the turns; None keeps none.
        rankings: file of the rankings; None keeps none.
    """

    transcript: Path | None
    rankings: Path | None

    @staticmethod
    def of(run: Path | None, transcript: Path | None) -> ChatFiles:
        """Return the files of a chat with a run, in its `kept` folder, or with a transcript that the user names."""
        folder = run / "kept" / "chat" if run is not None else None
        if transcript is None and folder is not None:
            transcript = folder / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}.jsonl"
        rankings = folder / RANKINGS if folder is not None else None
        if rankings is None and transcript is not None:
            rankings = transcript.with_name(f"{transcript.stem}.{RANKINGS}")
        return ChatFiles(transcript, rankings)

    def add_turn(self, turn: Mapping[str, Any]) -> None:
        """Append a turn to the transcript."""
        if self.transcript is not None:
            _append(self.transcript, turn)

    def add_ranking(self, ranking: Ranking) -> Path | None:
        """Append a ranking; return its file, or None if none is kept."""
        if self.rankings is not None:
            _append(self.rankings, ranking_to_json(ranking))
        return self.rankings


def _append(path: Path, row: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DiskError(
            f"cannot write {path}: {error.strerror or error}", hint="name another file with `--transcript FILE`"
        ) from error
