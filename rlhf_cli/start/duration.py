"""Says at the end of `rlhf start` how long the run will take on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.console import muted
from rlhf_cli.durations import format_duration
from rlhf_cli.pipeline.selection import Selection
from rlhf_cli.progress import say, warn
from rlhf_cli.quoting import word
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.start.draft import Draft
from rlhf_cli.start.measuring import obstacle, reason_of

if TYPE_CHECKING:
    from rlhf_cli.pipeline.run_plan import RunPlan

_SHORT = 5.0
"""Seconds of a stage that is not worth naming."""
_LONG = 1_800.0
"""Seconds of a run for which a shorter first one is offered."""
_FIRST_RUN = {"sampling.max_new_tokens": 128, "ppo.steps": 5}
"""What the settings of a shorter first run are lowered to."""


def say_how_long(draft: Draft, path: Path) -> None:
    """Say how long the run of a recipe will take, by stage; or why that is not known, and what to do."""
    command = f"`rlhf plan {word(path)}`"
    if (reason := obstacle(draft.model)) is not None:
        say(f"\nHow long it takes was not measured, since {reason}: {command} predicts it")
        return
    loaded = load_recipe(path)
    say("\nMeasuring how long that will take here, a minute or more; Ctrl-C skips it.")
    try:
        with muted():
            from rlhf_cli.pipeline.plan import plan_run

            plan = plan_run(loaded, loaded.recipe.default_run_dir, Selection())
    except KeyboardInterrupt:
        say(f"\nHow long it takes was not measured: {command} does that")
    except Exception as error:  # the recipe was checked; only the trial failed
        warn(f"how long it takes is not known: {reason_of(error)}; {command} tries again")
    else:
        say(f"\n{_time_line(plan, draft, command)}")
        if plan.others is not None:
            warn(plan.others)
        if (shorter := _shorter_run(plan, draft, path)) is not None:
            say(shorter)


def _shorter_run(plan: RunPlan, draft: Draft, path: Path) -> str | None:
    """Settings of a shorter first run and the time that it takes; None if this one is short or cannot be shortened."""
    from rlhf_cli.pipeline.plan import plan_run

    if plan.too_large:
        return None
    seconds, recipe = _seconds(plan), load_recipe(path).recipe
    whole = sum(seconds.values())
    lower = {name: least for name, least in _FIRST_RUN.items() if (recipe.value(name) or 0) > least}
    if whole < _LONG or not lower:
        return None
    settings = [f"{name}={least}" for name, least in lower.items()]
    with muted():
        short = plan_run(load_recipe(path, settings), plan.run_dir, Selection(), trial=False)
    work = {stage.name: stage.workload for stage in short.stages if stage.workload is not None}
    rates = {stage.name: stage.rates for stage in plan.stages if stage.rates is not None}
    # The lengths of completions that the trial found are those with the higher limit; the maximum holds for any.
    most = sum(sum(rates[name].seconds(work[name]).values()) for name in seconds if name in work)
    if most > whole / 2:
        return None
    commands = [f"`rlhf run {word(path)}`"]
    if draft.labels.source == "people":
        commands.insert(0, f"`rlhf label {word(path)}`")
    added = " ".join(f"--set {setting}" for setting in settings)
    cut = ", with more completions cut off" if "sampling.max_new_tokens" in lower else ""
    return f"A shorter first run takes {about(most)} at most{cut}: add `{added}` to {' and to '.join(commands)}"


def _seconds(plan: RunPlan) -> dict[str, float]:
    """Seconds of each stage whose time is known."""
    return {stage.name: sum(stage.seconds.values()) for stage in plan.stages if stage.seconds is not None}


def _time_line(plan: RunPlan, draft: Draft, command: str) -> str:
    """How long a run takes, by stage, in a line."""
    if plan.too_large:
        stages = " and ".join(f"`{stage.name}`" for stage in plan.too_large)
        plural = "do" if len(plan.too_large) > 1 else "does"
        return f"{stages} {plural} not fit the memory of this machine: {command} names settings to change"
    known = _seconds(plan)
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
