"""Declaration of the `evaluate` stage."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli.data.records import prompt_key
from rlhf_cli.errors import RLHFError
from rlhf_cli.generation.contract import split_of
from rlhf_cli.models.resources import Extent, MemoryNeed
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import Flag, Sizes, Stage, StageContext, sampling_memory
from rlhf_cli.stages.evaluate.inputs import EvaluateInputs, find_inputs
from rlhf_cli.stages.evaluate.settings import EvaluateSettings

_LARGEST_FILE = 2**24
"""Bytes of a prompt file that is still read to count its prompts before anything runs."""


def _sizes(settings: EvaluateSettings, recipe: RunSettings) -> Sizes:
    from rlhf_cli.statistics.wording import PRECISION, expected_precision

    models = 2 + len(settings.policies)
    sizes: dict[str, int | str] = {
        "completions per prompt, all models together": models * settings.samples_per_prompt,
    }
    if count := prompt_count(settings, recipe):
        sizes["prompts to evaluate on, at most"] = count
        sizes[PRECISION] = expected_precision(count)
    return sizes


def prompt_count(settings: EvaluateSettings, recipe: RunSettings) -> int | None:
    """Return how many prompts will be evaluated on at most, as far as is known before anything runs.

    It is `evaluate.max_prompts`, or the number of prompts in a file that can be read, whichever is smaller. Prompts
    that are too long or were trained on count here.
    """
    found = _prompts_in_file(settings, recipe)
    known = [one for one in (found, settings.max_prompts) if one is not None]
    return min(known, default=None)


def _prompts_in_file(settings: EvaluateSettings, recipe: RunSettings) -> int | None:
    """Return the number of held-out prompts in the prompt file, or of all in `evaluate.prompts`; None if unknown."""
    from rlhf_cli.data.sources import iter_records

    source = Path(settings.prompts or recipe.data.prompts or "")
    if not source.is_file() or source.stat().st_size > _LARGEST_FILE:
        return None
    try:
        records = list(
            iter_records(
                str(source),
                "prompt",
                columns=recipe.data.columns,
                comparison=recipe.data.comparison,
                on_skip=lambda skip: None,
            )
        )
    except RLHFError:
        return None  # the run reports it
    split = split_of(recipe.data, None)
    held_out = [one.prompt for one in records if settings.prompts is not None or split.holds_out(one.prompt)]
    return len({prompt_key(prompt) for prompt in held_out})


def _memory(settings: EvaluateSettings, recipe: RunSettings, extent: Extent) -> MemoryNeed:
    return sampling_memory(settings.sampling, recipe, extent)


EvaluateContext = StageContext[EvaluateSettings, EvaluateInputs]

STAGE = Stage(
    name="evaluate",
    settings=EvaluateSettings,
    inputs_type=EvaluateInputs,
    inputs=find_inputs,
    writes="evaluation",
    module="rlhf_cli.stages.evaluate.run",
    flags=(
        Flag(
            "--baseline",
            "evaluate.baseline",
            "Baseline; default: the output of `sft`.",
            "MODEL",
        ),
        Flag(
            "--policy",
            "evaluate.policy",
            "Model to evaluate; default: the output of `ppo`.",
            "MODEL",
        ),
        Flag(
            "--also",
            "evaluate.policies",
            "One more model to evaluate; repeatable.",
            "[NAME=]MODEL",
            repeatable=True,
            entry="model",
        ),
        Flag("--reward-model", "evaluate.reward_model", "Reward model; default: the output of `train-rm`.", "MODEL"),
        Flag(
            "--function",
            "evaluate.judge_function",
            "Scoring function that decides which model wins.",
            "FILE.py:NAME",
        ),
        Flag(
            "--prompts",
            "evaluate.prompts",
            "Prompts, all of which are used; default: the held-out ones.",
            "DATA",
        ),
        Flag(
            "--demonstrations",
            "evaluate.demonstrations",
            "Demonstrations to measure the perplexity of every model on.",
            "DATA",
        ),
    ),
    sizes=_sizes,
    memory=_memory,
    workload="rlhf_cli.stages.evaluate.workload",
    unaffected_by=("model.build", "model.quantize"),
    keeps_earlier=True,
)
