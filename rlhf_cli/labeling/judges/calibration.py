"""A judge is measured against people before it is trusted: below the floor nothing is labeled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.data.records import Candidates
from rlhf_cli.errors import DataError
from rlhf_cli.labeling.judges.measures import Agreement, agreement, by_subset
from rlhf_cli.labeling.judges.panel import Ballot
from rlhf_cli.labeling.judges.verdicts import Verdicts


@dataclass(frozen=True)
class Calibration:
    """Agreement with human rankings.

    Attributes:
        source: where the rankings came from.
        panel: of the verdict that labels are made of.
        subsets: the same within each subset that the data names.
        judges: of each judge alone, by name.
    """

    source: str
    panel: Agreement
    subsets: dict[str, Agreement]
    judges: dict[str, Agreement]

    @staticmethod
    def of(
        source: str, candidates: Sequence[Candidates], ballots: Sequence[Ballot], verdicts: Sequence[Verdicts]
    ) -> Calibration:
        """Measure.

        Args:
            source: where the rankings came from.
            candidates: prompts with answers whose order people gave.
            ballots: of each judge.
            verdicts: of the panel.

        Raises:
            DataError: people tied everything, so that there is nothing to agree with.
        """
        found = agreement(candidates, verdicts)
        if found is None:
            raise DataError(
                f"{source}: people ranked no answer above another there, so no judge can be measured by it",
                hint="name rankings with more than one tier as `label.judge.calibration`",
            )
        judges = {ballot.judge.name: agreement(candidates, ballot.verdicts) for ballot in ballots}
        known = {name: each for name, each in judges.items() if each is not None}
        return Calibration(source, found, by_subset(candidates, verdicts), known)

    def check(self, floor: float | None) -> None:
        """Raise `DataError` where the panel agrees with people less than `floor`."""
        rate = self.panel.rate
        assert rate.value is not None
        if floor is None or rate.value >= floor:
            return
        each = "; ".join(f"{name} {one.rate.value or 0.0:.1%}" for name, one in self.judges.items())
        raise DataError(
            f"{self.source}: the judges agree with people on {rate.value:.1%} of {rate.count:,} untied pairs (95% "
            f"interval {rate.low:.1%} to {rate.high:.1%}), less than `label.judge.floor: {floor:g}`; nothing was "
            f"labeled ({each})",
            hint="try another judge or rubric, or lower the floor if so much is enough; verdicts are kept, and asking "
            "again costs nothing",
        )

    def to_json(self) -> dict[str, Any]:
        """As it stands in the report."""
        return {
            "source": self.source,
            "panel": self.panel.to_json(),
            "subsets": {name: one.to_json() for name, one in self.subsets.items()},
            "judges": {name: one.to_json() for name, one in self.judges.items()},
        }
