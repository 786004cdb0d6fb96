"""Labeling, as the pipeline sees it."""

from __future__ import annotations

import math

from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import Flag, Sizes, Stage, StageContext
from rlhf_cli.stages.label.inputs import LabelInputs, find_inputs
from rlhf_cli.stages.label.settings import LabelSettings


def _sizes(settings: LabelSettings, recipe: RunSettings) -> Sizes:
    if not settings.samples:
        return {}
    count = settings.completions_per_prompt
    return {"completions per prompt": count, "pairs per prompt, ties aside": math.comb(count, 2)}


LabelContext = StageContext[LabelSettings, LabelInputs]

STAGE = Stage(
    name="label",
    settings=LabelSettings,
    inputs_type=LabelInputs,
    inputs=find_inputs,
    writes="rankings",
    module="rlhf_cli.stages.label.run",
    flags=(
        Flag("--model", "label.model", "Policy to sample from; default: what `sft` wrote (`label.model`).", "MODEL"),
        Flag("--prompts", "label.prompts", "Prompt records: a file, folder or hub data set (`label.prompts`).", "DATA"),
        Flag("--items", "label.items", "Completions to rank, in place of sampled ones (`label.items`).", "DATA"),
        Flag("--function", "label.function", "Scores completions, `file.py:function` (`label.function`).", "FUNCTION"),
        Flag("--reward-model", "label.reward_model", "Scores completions (`label.reward_model`).", "MODEL"),
        Flag("--data", "label.data", "Rankings or preferences to import (`label.data`).", "DATA"),
        Flag(
            "--calibrate",
            "label.judge.calibration",
            "Labels by people that judges are compared with (`label.judge.calibration`).",
            "DATA",
        ),
        Flag("--floor", "label.judge.floor", "Least agreement with them (`label.judge.floor`).", "SHARE", kind=float),
        Flag("--overlap", "label.human.overlap", "Annotators per prompt (`label.human.overlap`).", "N", kind=int),
        Flag("--guidelines", "label.human.guidelines", "What annotators read (`label.human.guidelines`).", "FILE"),
    ),
    sizes=_sizes,
    unaffected_by=("model.build", "model.quantize"),
)
