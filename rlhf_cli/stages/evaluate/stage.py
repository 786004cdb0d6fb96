"""The evaluation, as the pipeline sees it."""

from __future__ import annotations

from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import Flag, Sizes, Stage, StageContext
from rlhf_cli.stages.evaluate.inputs import EvaluateInputs, find_inputs
from rlhf_cli.stages.evaluate.settings import EvaluateSettings


def _sizes(settings: EvaluateSettings, recipe: RunSettings) -> Sizes:
    return {"completions per prompt, both models": 2 * settings.samples_per_prompt}


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
            "Model to compare with; default: what `sft` wrote (`evaluate.baseline`).",
            "MODEL",
        ),
        Flag(
            "--policy",
            "evaluate.policy",
            "Model under evaluation; default: what `ppo` wrote (`evaluate.policy`).",
            "MODEL",
        ),
        Flag("--reward-model", "evaluate.reward_model", "Reward model to report (`evaluate.reward_model`).", "MODEL"),
        Flag(
            "--function",
            "evaluate.judge_function",
            "Judge, as `file.py:function` (`evaluate.judge_function`).",
            "FUNCTION",
        ),
        Flag(
            "--prompts",
            "evaluate.prompts",
            "Prompt records: a file, folder or hub data set (`evaluate.prompts`).",
            "DATA",
        ),
    ),
    sizes=_sizes,
    unaffected_by=("model.build", "model.quantize"),
)
