"""Declaration of the `train-rm` stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_cli.models.memory_estimate import MemoryNeed, ModelShape, frozen_bytes, number_bytes, training_need
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import Flag, Sizes, Stage, StageContext, training_bytes
from rlhf_cli.stages.inputs import Input, InputFinder, StageInputs
from rlhf_cli.stages.reward_model.requirements import check_requirements
from rlhf_cli.stages.reward_model.settings import RewardModelSettings


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


def _device_need(settings: RewardModelSettings, recipe: RunSettings, shape: ModelShape) -> MemoryNeed:
    model, is_full = recipe.model, settings.adapter == "none"
    rows, most, longest = (
        min(settings.micro_batch_size, settings.batch_size),
        settings.micro_batch_tokens,
        2 * settings.max_length,
    )
    tokens = rows * longest if most is None else min(settings.batch_size * longest, max(longest, most))
    return training_need(
        trained=shape.weights if is_full else shape.adapter(settings.lora.rank),
        frozen=0 if is_full else shape.weights,
        frozen_bytes=frozen_bytes(model.dtype, model.precision, model.quantize),
        activations=shape.activations(tokens, number_bytes(model.precision), recompute=settings.gradient_checkpointing),
        optimizer=settings.optimizer,
        embeddings=shape.embeddings if is_full else 0,
    )


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
    device_need=_device_need,
    unaffected_by=("model.build",),
    accept=check_requirements,
)
