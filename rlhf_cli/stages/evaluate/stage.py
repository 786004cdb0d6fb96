"""Declaration of the `evaluate` stage."""

from __future__ import annotations

from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.memory_estimate import MemoryNeed, ModelShape, number_bytes
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import Flag, Sizes, Stage, StageContext
from rlhf_cli.stages.evaluate.inputs import EvaluateInputs, find_inputs
from rlhf_cli.stages.evaluate.settings import EvaluateSettings


def _sizes(settings: EvaluateSettings, recipe: RunSettings) -> Sizes:
    return {"completions per prompt, both models together": 2 * settings.samples_per_prompt}


def _device_need(settings: EvaluateSettings, recipe: RunSettings, shape: ModelShape) -> MemoryNeed:
    size = number_bytes(recipe.model.precision)
    sampled = settings.sampling.max_new_tokens or recipe.sampling.max_new_tokens or Sampling.max_new_tokens
    rows = settings.sampling.batch_size
    decoding = shape.cache(rows, recipe.data.max_prompt_tokens + sampled, size) + shape.sampling(rows)
    return MemoryNeed(weights=shape.weights * size, decoding=decoding)


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
    device_need=_device_need,
    unaffected_by=("model.build", "model.quantize"),
    keeps_earlier=True,
)
