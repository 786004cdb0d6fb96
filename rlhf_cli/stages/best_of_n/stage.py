"""Declaration of the `best-of-n` stage."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.models.resources import Extent, MemoryNeed
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import Flag, Sizes, Stage, StageContext, sampling_memory
from rlhf_cli.stages.best_of_n.settings import BestOfNSettings
from rlhf_cli.stages.inputs import Input, InputFinder, StageInputs


@dataclass(frozen=True)
class BestOfNInputs(StageInputs):
    """Inputs of best of n.

    Attributes:
        policy: model that samples completions; None if `samples` gives them.
        prompts: prompt records.
        samples: completions of an earlier best of n.
        reward_model: reward model that chooses.
        function: function that chooses.
        gold_model: reward model that measures what was chosen.
        gold_function: function that measures what was chosen.
    """

    policy: Input | None
    prompts: Input | None
    samples: Input | None
    reward_model: Input | None
    function: Input | None
    gold_model: Input | None
    gold_function: Input | None


def find_inputs(settings: BestOfNSettings, recipe: RunSettings, find: InputFinder) -> BestOfNInputs:
    """Find the inputs of the stage; raises `UsageError` if one is missing."""
    draws = settings.samples is None
    reward_model = find.named("model", settings.reward_model, "reward_model", role="reward model")
    if reward_model is None and settings.function is None:
        also = ", or choose by a function with `--set best_of_n.function=FILE.py:FUNCTION`"
        reward_model = find.artifact("train-rm", "reward_model", also=also)
    return BestOfNInputs(
        **find.shared(),
        policy=find.policy("policy", settings.policy) if draws else None,
        prompts=find.prompts(settings.prompts) if draws else None,
        samples=find.named("file", settings.samples, "samples"),
        reward_model=reward_model,
        function=find.named("function", settings.function, "function"),
        gold_model=find.named("model", settings.gold_model, "gold_model", role="reward model"),
        gold_function=find.named("function", settings.gold_function, "gold_function"),
    )


def _sizes(settings: BestOfNSettings, recipe: RunSettings) -> Sizes:
    return {} if settings.samples is not None else {"completions per prompt": settings.samples_per_prompt}


def _memory(settings: BestOfNSettings, recipe: RunSettings, extent: Extent) -> MemoryNeed | None:
    return sampling_memory(settings.sampling, recipe, extent) if settings.samples is None else None


BestOfNContext = StageContext[BestOfNSettings, BestOfNInputs]

STAGE = Stage(
    name="best-of-n",
    settings=BestOfNSettings,
    inputs_type=BestOfNInputs,
    inputs=find_inputs,
    writes="best of n",
    module="rlhf_cli.stages.best_of_n.run",
    flags=(
        Flag("--policy", "best_of_n.policy", "Model to sample; default: the output of `sft`.", "MODEL"),
        Flag(
            "--reward-model",
            "best_of_n.reward_model",
            "Reward model that chooses the best; default: the output of `train-rm`.",
            "MODEL",
        ),
        Flag("--function", "best_of_n.function", "Function that chooses the best.", "FILE.py:NAME"),
        Flag("--gold", "best_of_n.gold_function", "Function that measures what was chosen.", "FILE.py:NAME"),
        Flag("--prompts", "best_of_n.prompts", "Prompts; default: the held-out ones.", "DATA"),
        Flag("--samples", "best_of_n.samples", "Completions of an earlier best-of-n.", "FILE"),
        Flag("--n", "best_of_n.samples_per_prompt", "Completions per prompt.", "N", kind=int),
    ),
    sizes=_sizes,
    memory=_memory,
    unaffected_by=("model.build", "model.quantize"),
    keeps_earlier=True,
)
