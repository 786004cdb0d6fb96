"""Says at the end of `rlhf start` how long the run will take on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.console import muted, spinner
from rlhf_cli.durations import format_duration
from rlhf_cli.pipeline.selection import Selection
from rlhf_cli.progress import say, warn
from rlhf_cli.quoting import word
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.start.draft import Draft
from rlhf_cli.start.measuring import obstacle, reason_of

if TYPE_CHECKING:
    from rlhf_cli.pipeline.plan import RunPlan

_SHORT = 5.0
"""Seconds of a stage that is not worth naming."""


def say_how_long(draft: Draft, path: Path) -> None:
    """Say how long the run of a recipe will take, by stage; or why that is not known, and what to do."""
    command = f"`rlhf plan {word(path)}`"
    if (reason := obstacle(draft.model)) is not None:
        say(f"\nHow long it takes was not measured, since {reason}: {command} predicts it")
        return
    loaded = load_recipe(path)
    try:
        with spinner("measuring how long that will take here, a minute or more; Ctrl-C skips it ..."), muted():
            from rlhf_cli.pipeline.plan import plan_run

            plan = plan_run(loaded, loaded.recipe.default_run_dir, Selection())
    except KeyboardInterrupt:
        say(f"\nHow long it takes was not measured: {command} does that")
    except Exception as error:  # the recipe was checked; only the trial failed
        warn(f"how long it takes is not known: {reason_of(error)}; {command} tries again")
    else:
        say(f"\n{_time_line(plan, draft, command)}")


def _time_line(plan: RunPlan, draft: Draft, command: str) -> str:
    """How long a run takes, by stage, in a line."""
    known = {stage.name: sum(stage.seconds.values()) for stage in plan.stages if stage.seconds is not None}
    unknown = [stage.name for stage in plan.stages if stage.seconds is None and stage.action != "cached"]
    if not known:
        return f"How long it takes is not known: {command} says why"
    parts = [f"{name} {about(seconds)}" for name, seconds in known.items() if seconds >= _SHORT]
    text = f"The run takes about {about(sum(known.values()))} here"
    text += f": {', '.join(parts)}" if len(parts) > 1 else ""
    uncounted = [f"`{name}`" for name in unknown]
    uncounted += ["the time in which you rank"] if draft.labels.source == "people" else []
    uncounted += ["the judges"] if draft.labels.source == "judge" else []
    return f"{text}; without {' and '.join(uncounted)}" if uncounted else text


def about(seconds: float) -> str:
    """A duration as an estimate: 40 s, 7 min, 2 h 10 min."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else format_duration(60 * minutes)
