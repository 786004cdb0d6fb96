"""Declaration of the `sft` stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_cli.errors import UsageError
from rlhf_cli.models.resources import Extent, MemoryNeed, loading, memory_need, saving, shards
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import Flag, Sizes, Stage, StageContext, training_bytes
from rlhf_cli.stages.inputs import Input, InputFinder, StageInputs
from rlhf_cli.stages.sft.settings import SFTSettings
from rlhf_cli.stages.training_memory import training_memory


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
    rank = settings.lora.rank if settings.adapter == "lora" else None
    need = training_memory(settings, recipe, extent, role="policy", rank=rank, longest=settings.max_length)
    update = need.weights | need.update | {"logits": extent.shape.logits(need.tokens)}
    parts = shards(recipe.model, extent)
    load = loading(extent, need.weights, parts)
    save = saving(extent, parts=parts, offloads=recipe.model.sharding_cpu_offload)
    return memory_need(extent, {"load": load, "update": update, "save": save})


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
    steps_setting="sft.epochs",
    fixed_steps=lambda settings: settings.fixed_steps("sft"),
)
