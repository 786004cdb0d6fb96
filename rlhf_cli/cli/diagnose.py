"""`rlhf diagnose`: what is wrong with a run, the evidence, and the setting to try."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import typer

from rlhf_cli.cli.options import Json, RunArgument

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rlhf_cli.pipeline.diagnosis import StageDiagnosis

_WIDTH = 100
"""Columns where stdout is not a terminal."""
_STATES = {
    "finished": "finished",
    "outdated": "finished, but made from an outdated output of an earlier stage; "
    "the command that started the run makes it again",
    "to come": "not started; the command that started the run continues with it",
    "running": "running",
    "stopped": "stopped by a detector",
    "diverged": "diverged",
    "interrupted": "interrupted; the command that started the run resumes it",
    "failed": "failed",
    "killed": "ended without an error message, as after `kill -9`; the command that started the run resumes it",
    "damaged": "damaged",
}
_VERDICTS = {
    "fine": "nothing stands out",
    "look": "something is worth a look",
    "bad": "do not trust this run as it is",
}


def diagnose(run: RunArgument, as_json: Json = False) -> None:
    """Say what is wrong with a run, from its files, whether it finished, stopped, was killed or diverged.

    Each finding has the evidence (numbers, steps, completions) and the settings to try. docs/health.md lists the rules.
    """
    from rlhf_cli.pipeline import diagnosis

    found = diagnosis.diagnose(run.expanduser())
    if as_json:
        typer.echo(json.dumps(found.as_json(), ensure_ascii=False, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else _WIDTH)
    rest = f"; not complete: {', '.join(found.unfinished)}" if found.unfinished else ""
    console.print(f"{found.run_dir}: {_VERDICTS[found.verdict]}{rest}", markup=False)
    for stage in found.stages:
        console.print()
        console.print(_view(stage))


def _view(stage: StageDiagnosis) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from rlhf_cli.training.monitoring.health.report import excerpt, table_of

    steps = f" after step {stage.steps:,}" if stage.steps else ""
    parts: list[RenderableType] = [Text(f"{stage.stage}: {_STATES[stage.state]}{steps}", style="bold")]
    parts += [Text(f"  {excerpt(text, 500)}") for text in (stage.told, stage.hint and f"hint: {stage.hint}") if text]
    if stage.findings:
        parts.append(table_of(stage.findings))
    if stage.samples:
        parts.append(Text(f"completions after step {stage.samples[0]['step']:,} (samples.jsonl):"))
        parts += [Text(f'  "{excerpt(one["completion"], 120)}"{_reward(one.get("score"))}') for one in stage.samples]
    return Group(*parts)


def _reward(score: float | None) -> str:
    return "" if score is None else f" (reward {score:+.2f})"
