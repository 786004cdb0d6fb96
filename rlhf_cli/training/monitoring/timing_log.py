"""Times and throughput: a line per step in `timing.jsonl`, their totals, and the table at the end of a stage.

Imports no torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.console import console, interactive
from rlhf_cli.durations import format_duration
from rlhf_cli.progress import say
from rlhf_cli.training.monitoring.step_lines import StepLines, read_rows

TIMING = "timing.jsonl"

_BESIDE = ("checkpoint", "eval")
"""Phases that are not training: they do not count in throughput and utilization."""


@dataclass(frozen=True)
class Work:
    """What a phase of a step did, over all processes.

    Attributes:
        tokens: tokens that were sampled, passed or trained; padding does not count.
        flops: floating-point operations; None where they are not known.
    """

    tokens: int
    flops: float | None = None


def timing_row(
    seconds: Mapping[str, float],
    work: Mapping[str, Work] | None = None,
    *,
    episodes: int = 0,
    peak: float | None = None,
) -> dict[str, float]:
    """Return what `timing.jsonl` says of a step.

    Args:
        seconds: phase -> seconds; `step` is the whole.
        work: phase -> what it did.
        episodes: completions that were sampled and trained on.
        peak: operations per second that the devices of all processes can do; None is not known.
    """
    row: dict[str, float] = {f"time/{name}": value for name, value in seconds.items()}
    for name, done in (work or {}).items():
        row[f"tokens/{name}"] = done.tokens
        if done.flops is not None:
            row[f"flops/{name}"] = done.flops
    if episodes:
        row["episodes"] = episodes
    if peak is not None and work and all(done.flops is not None for done in work.values()):
        row["flops/possible"] = _busy(row) * peak
    return _rounded(row | throughput(row))


def throughput(row: Mapping[str, float]) -> dict[str, float]:
    """Return rates from the seconds, tokens and operations of a step or of many."""
    found: dict[str, float] = {}
    busy = _busy(row)
    rates = {
        "tokens_per_second": (row.get("tokens/update"), row.get("time/update", 0.0)),
        "generated_tokens_per_second": (row.get("tokens/rollout"), row.get("time/rollout", 0.0)),
        "episodes_per_second": (row.get("episodes"), busy),
        "mfu": (sum(_flops(row).values()), row.get("flops/possible", 0.0)),
    }
    for name, (amount, per) in rates.items():
        if amount and per > 0:
            found[f"throughput/{name}"] = amount / per
    return found


def _busy(row: Mapping[str, float]) -> float:
    """Seconds of a step without checkpoint and evaluation."""
    return row.get("time/step", 0.0) - sum(row.get(f"time/{name}", 0.0) for name in _BESIDE)


def _flops(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith("flops/") and name != "flops/possible"}


def totals(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return sums of seconds, tokens, episodes and operations over rows of `timing.jsonl`, and rates over all."""
    sums: defaultdict[str, float] = defaultdict(int)
    for row in rows:
        for name, value in row.items():
            if name != "step" and not name.startswith("throughput/") and value is not None:
                sums[name] += value
    return _rounded(dict(sums) | throughput(sums))


def read_totals(work: Path) -> dict[str, float]:
    """Return the totals of the `timing.jsonl` in a folder; empty without one."""
    return totals(read_rows(work / TIMING))


class TimingLog:
    """Appends to a `timing.jsonl`; a resumed run continues it.

    Unlike the metrics, it is not part of a checkpoint. A line that a kill tore or lost stays lost, and steps that run
    again replace theirs.

    Args:
        work: folder of the file.
        after_step: lines of later steps are dropped.
    """

    def __init__(self, work: Path, *, after_step: int) -> None:
        self._lines = StepLines(work / TIMING, after_step=after_step, sparse=True)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Append a line."""
        self._lines.append({"step": step, **{name: value for name, value in row.items() if math.isfinite(value)}})

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._lines.close()


def _rounded(row: Mapping[str, float]) -> dict[str, float]:
    """Return values with six significant digits, which is more than clocks can tell; whole numbers stay."""
    return {name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in row.items()}


def append_attempt(work: Path, row: Mapping[str, float]) -> None:
    """Append a row of an attempt of a stage without steps, which ended before the stage was done."""
    done = len(read_rows(work / TIMING))
    log = TimingLog(work, after_step=done)
    log.write(done + 1, row)
    log.close()


def append_evaluation(work: Path, step: int, seconds: Mapping[str, float]) -> None:
    """Append the seconds of an evaluation that follows the last step; see `StepWatch.end_step`."""
    log = TimingLog(work, after_step=step)
    log.write(step, timing_row(seconds))
    log.close()


_LARGEST = 5
"""Phases that get a row of the table, at most."""
_SMALLEST = 0.005
"""Share of the stage that a row has, at least: less would be shown as 0 %."""
_NAMES = {
    "rollout": "sampling",
    "scoring": "scoring",
    "passes": "forward passes",
    "update": "updates",
    "checkpoint": "checkpoints",
    "eval": "evaluation",
}
_COLUMNS = ("time", "share", "tokens/s", "MFU")
PEOPLE = "time/people"
"""Seconds of active time of annotators, who work beside the stage or while it does not run."""


def whole_seconds(timing: Mapping[str, float], seconds: float) -> float:
    """Return the seconds of a stage over all of its attempts, as far as they were logged, without `PEOPLE`.

    Args:
        timing: see `totals`.
        seconds: duration of the last attempt.
    """
    phases = sum(timing.get(f"time/{name}", 0.0) for name in _NAMES)
    return max(seconds, phases, timing.get("time/step", 0.0))


def table_rows(timing: Mapping[str, float], seconds: float) -> list[Sequence[str]]:
    """Return the rows of "where the time went": the largest phases, all else as `other`, and the whole;
    none where no phase took long enough for a row.

    Args:
        timing: see `totals`.
        seconds: duration of the last attempt. What phases do not account for is loading, reading, saving and the like.
    """
    phases = {name: timing.get(f"time/{name}", 0.0) for name in _NAMES}
    whole = whole_seconds(timing, seconds)
    large = [name for name in phases if phases[name] and phases[name] >= _SMALLEST * whole]
    if not large:
        return []
    large = sorted(large, key=lambda name: -phases[name])[:_LARGEST]
    rows: list[Sequence[str]] = []
    for name, spent in phases.items():
        if name in large:
            rows.append((_NAMES[name], *_time(spent, whole), _rate(timing, name, spent), _used(timing, name, spent)))
    other = whole - sum(phases[name] for name in large)
    if other >= _SMALLEST * whole:
        rows.append(("other", *_time(other, whole), "", ""))
    mfu = timing.get("throughput/mfu")
    people = timing.get(PEOPLE)
    name = "whole stage" if people is None else "whole stage, without people"
    rows.append((name, *_time(whole, whole), "", "" if mfu is None else f"{mfu:.1%}"))
    if people is not None:
        rows.append(("people, while active", format_duration(people), "", "", ""))
    return rows


def _time(seconds: float, whole: float) -> tuple[str, str]:
    return format_duration(seconds), f"{seconds / whole:.0%}"


def _rate(timing: Mapping[str, float], name: str, seconds: float) -> str:
    tokens = timing.get(f"tokens/{name}")
    return f"{tokens / seconds:,.0f}" if tokens and seconds else ""


def _used(timing: Mapping[str, float], name: str, seconds: float) -> str:
    """Return the utilization in one phase, from the mean peak over all."""
    flops, busy = timing.get(f"flops/{name}"), _busy(timing)
    if not flops or not busy or "flops/possible" not in timing:
        return ""
    return f"{flops / (seconds * timing['flops/possible'] / busy):.1%}"


def show_table(stage: str, timing: Mapping[str, float], seconds: float) -> None:
    """Print where the time of a stage went, on stderr: at most 9 lines."""
    rows = table_rows(timing, seconds)
    if not rows:
        return
    lines = [(f"{stage}: where the time went", *_COLUMNS), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for number, (name, *cells) in enumerate(lines):
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text = "  ".join([name.ljust(widths[0]), *aligned]).rstrip()
        if interactive() and number == 0:
            console.print(text, style="bold", markup=False)
        else:
            say(text)
