"""Declaration of the `sft` stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_cli.errors import UsageError
from rlhf_cli.models.resources import (
    FLOAT32,
    Extent,
    MemoryNeed,
    frozen_bytes,
    loading,
    memory_need,
    moments,
    number_bytes,
    saving,
)
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import Flag, Sizes, Stage, StageContext, training_bytes
from rlhf_cli.stages.inputs import Input, InputFinder, StageInputs
from rlhf_cli.stages.sft.settings import SFTSettings


@dataclass(frozen=True)
class SFTInputs(StageInputs):
    """Inputs of supervised fine-tuning.

    Attributes:
        demonstrations: demonstrations to train on.
    """

    demonstrations: Input


def find_inputs(settings: SFTSettings, recipe: RunSettings, find: InputFinder) -> SFTInputs:
    """Find the inputs of the stage; raises `UsageError` if there is no base model."""
    shared = find.shared(trains_base=True)
    if shared["base"] is None:
        raise UsageError(
            "no base model: `sft` needs `model.path` or `model.build`",
            hint="specify a folder or hub id with `--set model.path=PATH`, or create a model with `model.build`",
        )
    demonstrations = Input("data", settings.data, "sft.data", records="demonstration", use="train")
    return SFTInputs(**shared, demonstrations=demonstrations)


def _sizes(settings: SFTSettings, recipe: RunSettings) -> Sizes:
    batches = math.ceil(settings.batch_size / settings.micro_batch_size)
    return {"micro-batches per optimizer step": batches, "peak learning rate": f"{settings.peak_rate:g}"}


def _check(settings: SFTSettings, recipe: RunSettings) -> None:
    build = recipe.model.build
    if settings.packing and build is not None and build.architecture == "encoder-decoder":
        raise ValueError("`sft.packing` needs a decoder-only model; `model.build` makes an encoder-decoder")


def _disk_bytes(settings: SFTSettings, model_bytes: int) -> int:
    return training_bytes(model_bytes, trained=int(settings.adapter == "none"), written=1, kept=2)


def _memory(settings: SFTSettings, recipe: RunSettings, extent: Extent) -> MemoryNeed:
    model, shape, is_full = recipe.model, extent.shape, settings.adapter == "none"
    rows, most = min(settings.micro_batch_size, settings.batch_size), settings.micro_batch_tokens
    whole, longest = settings.batch_size * settings.max_length, settings.max_length
    tokens = extent.tokens or (rows * longest if most is None else min(whole, max(longest, most)))
    size = number_bytes(model.precision)
    trained = shape.weights if is_full else shape.adapter(settings.lora.rank)
    frozen = 0.0 if is_full else shape.weights * frozen_bytes(model.dtype, model.precision, model.quantize)
    weights = {"policy": frozen, "trained weights": float(FLOAT32 * trained)}
    update = {
        "gradients": FLOAT32 * trained,
        "optimizer": moments(trained, settings.optimizer, shape.embeddings if is_full else 0),
        "activations": shape.activations(
            tokens, size, recompute=settings.gradient_checkpointing, is_adapter=not is_full
        ),
        "logits": shape.logits(tokens),
    }
    phases = {"load": loading(extent, weights), "update": weights | update, "save": saving(extent)}
    return memory_need(extent, phases)


SFTContext = StageContext[SFTSettings, SFTInputs]

STAGE = Stage(
    name="sft",
    settings=SFTSettings,
    inputs_type=SFTInputs,
    inputs=find_inputs,
    writes="SFT model",
    module="rlhf_cli.stages.sft.run",
    flags=(
        Flag("--model", "model.path", "Base model: a folder or hub id.", "MODEL"),
        Flag("--data", "sft.data", "Demonstrations: a file, folder or hub data set.", "DATA"),
    ),
    sizes=_sizes,
    check=_check,
    disk_bytes=_disk_bytes,
    memory=_memory,
    workload="rlhf_cli.stages.sft.workload",
    # `sampling` is recorded for the next stage; a change does not train again.
    unaffected_by=("sampling", "generation"),
)
