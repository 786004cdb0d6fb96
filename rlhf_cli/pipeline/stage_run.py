"""One stage in one process: what it gets, how it runs, and which of the settings its manifest records."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

from rlhf_cli.console import working
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.distributed.watchdog import watching
from rlhf_cli.errors import RLHFError
from rlhf_cli.memory import free_memory, is_out_of_memory
from rlhf_cli.pipeline.fingerprint import settings_of
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.base import Section
from rlhf_cli.stages.base import Stage, StageContext, StageOutcome
from rlhf_cli.stages.inputs import StageInputs


def stage_context(
    recipe: Recipe, run: RunDirectory, stage: Stage, inputs: StageInputs, stop: StopRequest
) -> StageContext[Any, Any]:
    """Return what a stage gets of its run."""
    return StageContext(
        stage=stage,
        settings=recipe.section(stage.name),
        inputs=inputs,
        recipe=recipe,
        output=run.output(stage.name),
        work=run.work(stage.name),
        stop=stop,
        tracked=settings_of(stage, recipe),
    )


def run_stage(context: StageContext[Any, Any]) -> StageOutcome:
    """Run a stage in this process.

    Raises:
        RLHFError: it ran out of memory, or any problem of the stage.
    """
    with working(f"{context.stage.name}: loading libraries ..."):
        module = importlib.import_module(context.stage.module)
    name, patience = context.stage.name, context.recipe.stall_seconds
    with contextlib.redirect_stdout(sys.stderr), _explained(context.stage, context.settings), watching(patience, name):
        outcome: StageOutcome = module.run(context)
    free_memory()
    return outcome


def manifest_settings(recipe: Recipe, stage: Stage, engine: Path) -> dict[str, Any]:
    """Return the settings for the manifest.

    Args:
        recipe: of the run.
        stage: that ran.
        engine: file with what drew its completions, which takes the place of `generation.engine`; need not exist.
    """
    plain = recipe.model_dump(mode="json")
    if engine.is_file():
        plain["generation"]["engine"] = engine.read_text(encoding="utf-8").strip()
    return {key: plain[key] for key in (stage.section, "model", "data", "sampling", "generation", "seed")}


@contextlib.contextmanager
def _explained(stage: Stage, settings: Section):
    """Turn running out of memory into an error with a hint."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise RLHFError(f"out of memory in `{stage.name}`", hint=_memory_hint(stage, settings)) from error
        raise


def _memory_hint(stage: Stage, settings: Section) -> str:
    """Name the settings that lower a stage's memory; a pass has been halved down to one row."""
    fields, is_lora = type(settings).model_fields, getattr(settings, "adapter", "lora") == "lora"
    torch = sys.modules.get("torch")
    ways = []
    if getattr(settings, "gradient_checkpointing", True) is False:
        ways.append(f"set `{stage.section}.gradient_checkpointing` to true")
    if getattr(settings, "offload_frozen", True) is False and not is_lora and torch and torch.cuda.is_available():
        ways.append(f"set `{stage.section}.offload_frozen` to true")
    lower = {"rollout_batch_size": "rollout_batch_size", "sampling": "sampling.batch_size"}
    ways += [f"lower `{stage.section}.{setting}`" for field, setting in lower.items() if field in fields]
    if ways:
        return f"{', or '.join(ways)}; the result stays the same, and the run resumes from its last checkpoint"
    smaller = "`model.quantize`" if is_lora else f"`{stage.section}.adapter: lora`"
    return f"use {smaller}, or a smaller model; the stage then starts from its first step"
