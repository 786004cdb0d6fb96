"""Memory of the supervised training stages, which train one model on micro-batches, and of copies of checkpoints.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_cli.models.model_shape import FLOAT32
from rlhf_cli.models.resources import Extent, frozen_bytes, moments, number_bytes, own_part, shards
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.settings.shared import TrainingSettings


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes by role.

    Attributes:
        weights: frozen and trained.
        update: what an update needs besides, and the copy of a checkpoint that is written meanwhile.
        tokens: of the largest micro-batch.
    """

    weights: dict[str, float]
    update: dict[str, float]
    tokens: int


def training_memory(
    settings: TrainingSettings, recipe: RunSettings, extent: Extent, *, role: str, rank: int | None, longest: int
) -> TrainingMemory:
    """Return the memory of training a model.

    Args:
        settings: of the stage.
        recipe: of the run.
        extent: of the stage.
        role: what its frozen weights are called.
        rank: of the adapter that is trained; None trains all weights.
        longest: most tokens of a record.
    """
    shape, is_full, model = extent.shape, rank is None, recipe.model
    rows, most = min(settings.micro_batch_size, settings.batch_size), settings.micro_batch_tokens
    whole = settings.batch_size * longest
    tokens = extent.tokens or (rows * longest if most is None else min(whole, max(longest, most)))
    trained = shape.weights if rank is None else shape.adapter(rank)
    frozen = 0.0 if is_full else shape.weights * frozen_bytes(model.dtype, model.precision, model.quantize)
    size = number_bytes(model.precision)
    activations = shape.activations(
        tokens,
        size,
        recompute=settings.gradient_checkpointing,
        rank=rank,
        on_cpu=extent.on_cpu,
    )
    state = moments(trained, settings.optimizer, shape.embeddings if is_full else 0)
    own = own_part(model, extent, FLOAT32 * trained)
    update = {
        "gradients": own,
        "optimizer": own_part(model, extent, state),
        "activations": float(activations),
        "gathered": shape.gathered(size, rank=rank, trains=True, on_cpu=extent.on_cpu)
        if shards(model, extent) > 1
        else 0.0,
    }
    update |= checkpoint_copy(recipe, extent, update["optimizer"] + own)
    return TrainingMemory({role: own_part(model, extent, frozen), "trained weights": own}, update, tokens)


def checkpoint_copy(recipe: RunSettings, extent: Extent, size: float) -> dict[str, float]:
    """Role of the copy from which a checkpoint is written in the background, where it is in the memory of the models.

    Args:
        recipe: of the run.
        extent: of the stage.
        size: bytes of trained weights and moments on a device.
    """
    return {"checkpoint copy": size} if recipe.checkpoint_async and extent.on_cpu else {}


def host_copy(settings: Any, recipe: RunSettings, extent: Extent, trained: int) -> float:
    """Bytes of host memory that the copy of a checkpoint takes on a machine with GPUs, at most.

    Args:
        settings: of the stage.
        recipe: of the run.
        extent: of the stage.
        trained: number of trained weights.
    """
    if not recipe.checkpoint_async or extent.on_cpu or not trained:
        return 0.0
    whole = int(getattr(settings, "adapter", "none") == "none") + int(getattr(settings, "critic_is_separate", False))
    state = moments(trained, getattr(settings, "optimizer", "adamw"), min(trained, whole * extent.shape.embeddings))
    parts = shards(recipe.model, extent)
    return (FLOAT32 * trained + state) * min(extent.machine or extent.processes, parts) / parts
