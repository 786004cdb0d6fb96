"""Writes the results of judging: all votes, each judge's rankings, and a report."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.data.records import Candidates, prompt_key
from rlhf_cli.labeling.judges.calibration import Calibration
from rlhf_cli.labeling.judges.measures import (
    KnownOrderAgreement,
    ReplyStatistics,
    VerdictStatistics,
    agreement,
    averaged,
    between,
    by_subset,
)
from rlhf_cli.labeling.judges.panel import Ballot, Vote
from rlhf_cli.labeling.judges.rates import Rate
from rlhf_cli.labeling.judges.verdicts import Tiers, Verdicts, tiers_of
from rlhf_cli.labeling.judges.warnings import warnings_of_judge, warnings_of_panel
from rlhf_cli.labeling.label_records import LabelRecord
from rlhf_cli.labeling.session.types import item_id
from rlhf_cli.labeling.warnings import LabelWarning

_EXCERPT = 500

VOTES, REPORT, LABELS = "votes.jsonl", "judge.json", "labels.jsonl"


@dataclass(frozen=True)
class JudgeReport:
    """Report about one judge.

    Attributes:
        name: of the judge.
        reply_statistics: of its replies.
        verdict_statistics: of its verdicts, with both orders combined.
        known: agreement with known orders.
        subsets: the same per subset.
        averaged: the same for mean probabilities over both orders, for a local judge.
    """

    name: str
    reply_statistics: ReplyStatistics
    verdict_statistics: VerdictStatistics
    known: KnownOrderAgreement | None
    subsets: dict[str, KnownOrderAgreement]
    averaged: KnownOrderAgreement | None

    @staticmethod
    def of(candidates: Sequence[Candidates], ballot: Ballot) -> JudgeReport:
        """Compute the report."""
        means = averaged(ballot)
        return JudgeReport(
            name=ballot.judge.name,
            reply_statistics=ReplyStatistics.of(candidates, ballot),
            verdict_statistics=VerdictStatistics.of(candidates, ballot.verdicts),
            known=agreement(candidates, ballot.verdicts),
            subsets=by_subset(candidates, ballot.verdicts),
            averaged=None if means is None else agreement(candidates, means),
        )

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON."""
        return {
            "name": self.name,
            **self.reply_statistics.to_json(),
            **self.verdict_statistics.to_json(),
            **_known_json(self.known, self.subsets),
            "known_by_mean_probability": None if self.averaged is None else self.averaged.to_json(),
        }


@dataclass(frozen=True)
class PanelReport:
    """Report about the whole panel.

    Attributes:
        judges: one report each.
        verdict_statistics: of the panel's verdicts.
        known: agreement of the panel with known orders.
        subsets: the same per subset.
        between: agreement of each two judges.
        calibration: agreement with human rankings, if given.
    """

    judges: list[JudgeReport]
    verdict_statistics: VerdictStatistics
    known: KnownOrderAgreement | None
    subsets: dict[str, KnownOrderAgreement]
    between: dict[tuple[str, str], Rate]
    calibration: Calibration | None

    @staticmethod
    def of(
        candidates: Sequence[Candidates],
        ballots: Sequence[Ballot],
        verdicts: Sequence[Verdicts],
        calibration: Calibration | None,
    ) -> PanelReport:
        """Compute the report."""
        prompts = [prompt_key(row.prompt) for row in candidates]
        return PanelReport(
            judges=[JudgeReport.of(candidates, ballot) for ballot in ballots],
            verdict_statistics=VerdictStatistics.of(candidates, verdicts),
            known=agreement(candidates, verdicts),
            subsets=by_subset(candidates, verdicts),
            between={
                (one.judge.name, other.judge.name): between(one.verdicts, other.verdicts, prompts)
                for one, other in itertools.combinations(ballots, 2)
            },
            calibration=calibration,
        )

    def warnings(self) -> list[LabelWarning]:
        """Warnings about each judge, and about the panel if there are several judges."""
        found: list[LabelWarning] = []
        for one in self.judges:
            found += warnings_of_judge(one.name, one.reply_statistics, one.verdict_statistics, one.known)
        if len(self.judges) > 1:
            found += warnings_of_panel(self.verdict_statistics, self.known, self.between)
        return found

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON."""
        return {
            "judges": [one.to_json() for one in self.judges],
            "panel": {
                **self.verdict_statistics.to_json(),
                **_known_json(self.known, self.subsets),
                "between_judges": [
                    {"judges": list(pair), "same_preference": rate.to_json()} for pair, rate in self.between.items()
                ],
            },
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "warnings": [asdict(warning) for warning in self.warnings()],
        }

    def metrics(self) -> dict[str, float]:
        """Bootstrap for the manifest."""
        asked = [one.reply_statistics for one in self.judges]
        worst = [one.consistent.value for one in asked if one.consistent.value is not None]
        found: dict[str, float | None] = {
            "judge/questions": float(sum(one.questions for one in asked)),
            "judge/failures": float(sum(sum(one.failures.values()) for one in asked)),
            "judge/tokens": float(sum(one.prompt_tokens + one.completion_tokens for one in asked)),
            "judge/cost": sum(one.cost for one in asked),
            "judge/swap_consistency": min(worst) if worst else None,
            "judge/longer_wins": self.verdict_statistics.longer_wins.value,
            "judge/accuracy": None if self.known is None else self.known.rate.value,
            "judge/calibration": None if self.calibration is None else self.calibration.panel.rate.value,
        }
        return {name: value for name, value in found.items() if value is not None}

    def summary(self) -> list[tuple[str, str]]:
        """Rows for the console."""
        rows = []
        for one in self.judges:
            consistent = one.reply_statistics.consistent
            parts = [f"{one.reply_statistics.questions:,} questions"]
            if consistent.value is not None:
                parts.append(f"consistent in both orders on {consistent.value:.0%}")
            if failures := sum(one.reply_statistics.failures.values()):
                parts.append(f"{failures:,} without a verdict")
            if one.reply_statistics.cost:
                parts.append(f"cost {one.reply_statistics.cost:.4g}")
            rows.append((f"judge {one.name}", ", ".join(parts)))
        if self.calibration is not None:
            rows.append(("agreement with people", str(self.calibration.panel.rate)))
        if self.known is not None:
            rows.append(("agreement with known order", str(self.known.rate)))
        return rows


def _known_json(known: KnownOrderAgreement | None, subsets: Mapping[str, KnownOrderAgreement]) -> dict[str, Any]:
    return {
        "known": None if known is None else known.to_json(),
        "known_by_subset": {name: one.to_json() for name, one in subsets.items()},
    }


def votes_json(candidates: Sequence[Candidates], ballots: Sequence[Ballot]) -> Iterator[dict[str, Any]]:
    """Convert every vote to an object, by prompt and judge."""
    for number, row in enumerate(candidates):
        for ballot in ballots:
            for vote in ballot.votes[number]:
                yield _vote_json(item_id(row), ballot.judge.name, vote)


def _vote_json(item: str, judge: str, vote: Vote) -> dict[str, Any]:
    reply = vote.reply
    return {
        "item": item,
        "judge": judge,
        "shown": list(vote.question.shown),
        "ranking": None if vote.levels is None else _ranking(vote.question.shown, vote.levels),
        "failure": vote.failure or None,
        "chances": None if reply.chances is None else list(reply.chances),
        "text": reply.text[:_EXCERPT],
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "cost": reply.cost,
        "cost_is_estimated": reply.is_estimated,
        "cached": vote.is_cached,
    }


def _ranking(shown: Sequence[int], levels: Sequence[int]) -> list[list[int]]:
    return [
        sorted(index for index, at in zip(shown, levels, strict=True) if at == level) for level in sorted(set(levels))
    ]


def labels(candidates: Sequence[Candidates], ballots: Sequence[Ballot]) -> Iterator[LabelRecord]:
    """Each judge's ranking of each prompt's completions, in the format of annotators' labels."""
    for number, row in enumerate(candidates):
        for ballot in ballots:
            verdicts = ballot.verdicts[number]
            is_ranked = is_enough(verdicts, len(row.completions))
            tiers: Tiers = tiers_of(verdicts, len(row.completions)) if is_ranked else ()
            yield LabelRecord(
                item=item_id(row),
                prompt=row.prompt,
                completions=row.completions,
                annotator=ballot.judge.name,
                outcome="ranked" if is_ranked else "skipped",
                tiers=tiers,
                shown=_shown(ballot.votes[number], len(row.completions)),
                reason="" if is_ranked else "no verdict",
            )


def _shown(votes: Sequence[Vote], count: int) -> tuple[int, ...]:
    """The order in which all completions were shown; empty if there were several orders, or pairs."""
    return votes[0].question.shown if len(votes) == 1 and len(votes[0].question.shown) == count else ()


def is_enough(verdicts: Verdicts, count: int) -> bool:
    """Whether at least half of the pairs have a verdict; otherwise the ranking would be mostly missing values."""
    return 2 * len(verdicts) >= count * (count - 1) // 2 and bool(verdicts)


def write_votes(path: Path, candidates: Sequence[Candidates], ballots: Sequence[Ballot]) -> None:
    """Write `votes.jsonl`."""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for vote in votes_json(candidates, ballots):
            file.write(json.dumps(vote, ensure_ascii=False) + "\n")
