"""Declaration of the `train-rm` stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.resources import Extent, MemoryNeed, loading, memory_need, number_bytes, own_part, saving, shards
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.settings.shared import StageSamplingSettings
from rlhf_cli.stages.base import Flag, Sizes, Stage, StageContext, drawing_memory, training_bytes
from rlhf_cli.stages.inputs import Input, InputFinder, StageInputs
from rlhf_cli.stages.reward_model.requirements import check_requirements
from rlhf_cli.stages.reward_model.settings import NORMALIZED_OVER, RewardModelSettings
from rlhf_cli.stages.training_memory import training_memory


@dataclass(frozen=True)
class RewardModelInputs(StageInputs):
    """Inputs of reward-model training.

    Attributes:
        policy: model to start from; rewards are normalized over its completions.
        rankings: rankings or preferences to train on.
    """

    policy: Input
    rankings: Input


def find_inputs(settings: RewardModelSettings, recipe: RunSettings, find: InputFinder) -> RewardModelInputs:
    """Find the inputs of the stage; raises `UsageError` if one is missing."""
    return RewardModelInputs(
        **find.shared(),
        policy=find.policy("model", settings.model, role="start of a reward model"),
        rankings=find.named("data", settings.data, "data", records="ranking")
        or find.artifact("label", "data", file="rankings.jsonl"),
    )


def _sizes(settings: RewardModelSettings, recipe: RunSettings) -> Sizes:
    sizes: dict[str, int | str] = {
        "micro-batches per optimizer step": math.ceil(settings.batch_size / settings.micro_batch_size),
        "peak learning rate": f"{settings.peak_rate:g}",
    }
    if settings.data is None and recipe.value("label.samples"):
        pairs = math.comb(recipe.value("label.completions_per_prompt"), 2)
        sizes["pairs per optimizer step, without ties"] = settings.batch_size * pairs
    return sizes


def _check(settings: RewardModelSettings, recipe: RunSettings) -> None:
    build = recipe.model.build
    if settings.model is None and build is not None and build.architecture == "encoder-decoder":
        raise ValueError("an encoder-decoder cannot be a reward model: set `train_rm.model` to another model")


def _disk_bytes(settings: RewardModelSettings, model_bytes: int) -> int:
    full = int(settings.adapter == "none")
    best = 2 * model_bytes * full if settings.chooses else 0  # two, while a better one is written
    trainings = settings.members + len(settings.data_curve)
    return trainings * (best + training_bytes(model_bytes, trained=full, written=full, kept=2))


def _memory(settings: RewardModelSettings, recipe: RunSettings, extent: Extent) -> MemoryNeed:
    rank = settings.lora.rank if settings.adapter == "lora" else None
    longest = 2 * settings.max_length
    need = training_memory(settings, recipe, extent, role="reward model", rank=rank, longest=longest)
    parts = shards(recipe.model, extent)
    phases = {"load": loading(extent, need.weights, parts), "update": need.weights | need.update}
    if settings.normalize and (settings.data is not None or recipe.value("label.by") == "import"):
        phases["rollout"] = need.weights | _drawing(recipe, extent)
    # An adapter is small; its base is read again to be compared.
    phases["save"] = phases["load"]
    if rank is None:
        phases["save"] = saving(extent, parts=parts, offloads=recipe.model.sharding_cpu_offload)
    return memory_need(extent, phases)


def _drawing(recipe: RunSettings, extent: Extent) -> dict[str, float]:
    """Roles of sampling the completions that rewards are normalized over."""
    prompts = min(NORMALIZED_OVER, extent.records or NORMALIZED_OVER)
    rows = min(StageSamplingSettings().batch_size, math.ceil(prompts / extent.processes))
    longest = (extent.prompt or recipe.data.max_prompt_tokens) + (
        recipe.sampling.max_new_tokens or Sampling.max_new_tokens
    )
    weights = own_part(recipe.model, extent, extent.shape.weights * number_bytes(recipe.model.precision))
    return {"SFT model": weights, **drawing_memory(recipe, extent, rows, longest)}


RewardModelContext = StageContext[RewardModelSettings, RewardModelInputs]

STAGE = Stage(
    name="train-rm",
    settings=RewardModelSettings,
    inputs_type=RewardModelInputs,
    inputs=find_inputs,
    writes="reward model",
    module="rlhf_cli.stages.reward_model.run",
    flags=(
        Flag("--model", "train_rm.model", "Initial model; default: the output of `sft`.", "MODEL"),
        Flag(
            "--data",
            "train_rm.data",
            "Rankings; default: the output of `label`.",
            "DATA",
        ),
    ),
    sizes=_sizes,
    check=_check,
    disk_bytes=_disk_bytes,
    memory=_memory,
    workload="rlhf_cli.stages.reward_model.workload",
    unaffected_by=("model.build",),
    accept=check_requirements,
    steps_setting="train_rm.epochs",
    fixed_steps=lambda settings: settings.fixed_steps("train_rm"),
)
