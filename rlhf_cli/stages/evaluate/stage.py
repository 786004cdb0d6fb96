"""Declaration of the `evaluate` stage."""

from __future__ import annotations

from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import Flag, Sizes, Stage, StageContext
from rlhf_cli.stages.evaluate.inputs import EvaluateInputs, find_inputs
from rlhf_cli.stages.evaluate.settings import EvaluateSettings


def _sizes(settings: EvaluateSettings, recipe: RunSettings) -> Sizes:
    return {"completions per prompt, both models together": 2 * settings.samples_per_prompt}


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
    ),
    sizes=_sizes,
    unaffected_by=("model.build", "model.quantize"),
    keeps_earlier=True,
)
