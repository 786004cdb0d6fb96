"""Declaration of the `label` stage."""

from __future__ import annotations

import math

from rlhf_cli.models.resources import Extent, MemoryNeed
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import Flag, Sizes, Stage, StageContext, sampling_memory
from rlhf_cli.stages.label.inputs import LabelInputs, find_inputs
from rlhf_cli.stages.label.settings import LabelSettings


def _sizes(settings: LabelSettings, recipe: RunSettings) -> Sizes:
    if not settings.samples:
        return {}
    count = settings.completions_per_prompt
    return {"completions per prompt": count, "pairs per prompt, without ties": math.comb(count, 2)}


def _memory(settings: LabelSettings, recipe: RunSettings, extent: Extent) -> MemoryNeed | None:
    return sampling_memory(settings.sampling, recipe, extent) if settings.samples else None


LabelContext = StageContext[LabelSettings, LabelInputs]

STAGE = Stage(
    name="label",
    settings=LabelSettings,
    inputs_type=LabelInputs,
    inputs=find_inputs,
    writes="rankings",
    module="rlhf_cli.stages.label.run",
    flags=(
        Flag("--model", "label.model", "Policy to sample; default: the output of `sft`.", "MODEL"),
        Flag("--prompts", "label.prompts", "Prompts: a file, folder or hub data set.", "DATA"),
        Flag("--items", "label.items", "Completions to rank instead of sampled ones.", "DATA"),
        Flag("--function", "label.function", "Function that scores completions.", "FILE.py:NAME"),
        Flag("--reward-model", "label.reward_model", "Reward model that scores completions.", "MODEL"),
        Flag("--data", "label.data", "Rankings or preferences to import.", "DATA"),
        Flag(
            "--calibrate",
            "label.judge.calibration",
            "Human labels to compare judges with.",
            "DATA",
        ),
        Flag(
            "--floor",
            "label.judge.floor",
            "Minimum agreement of judges with the labels of --calibrate.",
            "SHARE",
            kind=float,
        ),
        Flag("--overlap", "label.human.overlap", "Annotators per prompt.", "N", kind=int),
        Flag("--guidelines", "label.human.guidelines", "Instructions shown to annotators.", "FILE"),
    ),
    sizes=_sizes,
    memory=_memory,
    workload="rlhf_cli.stages.label.workload",
    unaffected_by=("model.build", "model.quantize"),
)
