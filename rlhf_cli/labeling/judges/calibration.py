"""Compares judges with human rankings before they label anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.data.records import Candidates
from rlhf_cli.errors import DataError
from rlhf_cli.labeling.judges.measures import KnownOrderAgreement, agreement, by_subset
from rlhf_cli.labeling.judges.panel import Ballot
from rlhf_cli.labeling.judges.verdicts import Verdicts


@dataclass(frozen=True)
class Calibration:
    """Agreement with human rankings.

    Attributes:
        source: where the rankings came from.
        panel: agreement of the panel's verdict.
        subsets: the same per subset named in the data.
        judges: the same per judge, by name.
    """

    source: str
    panel: KnownOrderAgreement
    subsets: dict[str, KnownOrderAgreement]
    judges: dict[str, KnownOrderAgreement]

    @staticmethod
    def of(
        source: str, candidates: Sequence[Candidates], ballots: Sequence[Ballot], verdicts: Sequence[Verdicts]
    ) -> Calibration:
        """Measure the agreement.

        Args:
            source: where the rankings came from.
            candidates: prompts and completions with a known order.
            ballots: of each judge.
            verdicts: of the panel.

        Raises:
            DataError: the human rankings consist of ties only.
        """
        found = agreement(candidates, verdicts)
        if found is None:
            raise DataError(
                f"{source}: all human rankings are ties, so judges cannot be compared with them",
                hint="set `judge.calibration` to rankings with more than one tier",
            )
        judges = {ballot.judge.name: agreement(candidates, ballot.verdicts) for ballot in ballots}
        known = {name: each for name, each in judges.items() if each is not None}
        return Calibration(source, found, by_subset(candidates, verdicts), known)

    def check(self, floor: float | None, section: str = "label.judge") -> None:
        """Raise `DataError` if the panel's agreement with the human rankings is below `floor`.

        Args:
            floor: least agreement; None accepts any.
            section: of the recipe that holds the floor, for messages.
        """
        rate = self.panel.rate
        assert rate.value is not None
        if floor is None or rate.value >= floor:
            return
        each = "; ".join(f"{name} {one.rate.value or 0.0:.1%}" for name, one in self.judges.items())
        raise DataError(
            f"{self.source}: the judges agree with the human rankings on {rate.value:.1%} of {rate.count:,} untied "
            f"pairs (95% interval {rate.low:.1%} to {rate.high:.1%}), below `{section}.floor: {floor:g}`; nothing "
            f"was labeled ({each})",
            hint="try another judge or rubric, or lower the floor if this is enough; the verdicts are kept, so a rerun "
            "costs nothing",
        )

    def to_json(self) -> dict[str, Any]:
        """Convert for the report."""
        return {
            "source": self.source,
            "panel": self.panel.to_json(),
            "subsets": {name: one.to_json() for name, one in self.subsets.items()},
            "judges": {name: one.to_json() for name, one in self.judges.items()},
        }
