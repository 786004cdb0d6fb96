"""Machines that `rlhf plan` plans for in the place of this one (`--gpu`), with what it then assumes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhf_cli.models.gpus import Cluster
from rlhf_cli.models.resources import Extent, ModelShape, vllm_least
from rlhf_cli.pipeline.prediction import Predictor, Took
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.settings.shared import OUR_ATTENTION
from rlhf_cli.stages.workload import Workload


@dataclass(frozen=True)
class Target:
    """What is planned for.

    Attributes:
        cluster: the GPUs.
        shape: sizes of all models; None takes those of the recipe.
    """

    cluster: Cluster
    shape: ModelShape | None = None

    def here(self, recipe: Recipe) -> Recipe:
        """Return the recipe with which this machine can read data and models."""
        changes: dict[str, Any] = {"device": "cpu", "sharding": "none"}
        if recipe.model.precision == "auto":
            changes["precision"] = "bfloat16"
        if recipe.model.attention in OUR_ATTENTION:
            changes["attention"] = "auto"
        generation = recipe.generation.model_copy(update={"engine": "torch"})
        return _changed(recipe, changes).model_copy(update={"generation": generation})

    def there(self, here: Recipe, asked: Recipe) -> Recipe:
        """Return the recipe that the formulas count with: `here`, with what is only used on the other machines."""
        changed = _changed(here, {"sharding": asked.model.sharding})
        return changed.model_copy(update={"generation": asked.generation})

    def extent(self, extent: Extent, workload: Workload) -> Extent:
        """Return the extent of a stage on these GPUs; a micro-batch has at most what is a process's own."""
        tokens = extent.tokens
        training = [work for work in workload.work if work.kind == "train"]
        if tokens is not None and training:
            own = min(math.ceil(work.each / self.cluster.count) / work.rows for work in training)
            tokens = math.ceil(tokens * min(1.0, own))
        return replace(
            extent, on_cpu=False, tokens=tokens, processes=self.cluster.count, device=int(self.cluster.memory)
        )

    def notes(self, recipe: RunSettings, extent: Extent, workload: Workload) -> tuple[str, ...]:
        """Return what vLLM needs where its share of a GPU is too small for it to start."""
        longest = [work.longest for work in workload.work if work.kind == "draw"]
        if recipe.generation.vllm_server is not None:
            return ("times are not predicted with `generation.vllm_server`: its GPUs are not known",)
        if recipe.generation.engine != "vllm" or not longest:
            return ()
        least = vllm_least(extent.shape, (extent.prompt or 0) + max(longest)) / self.cluster.memory
        if least <= recipe.generation.gpu_memory_utilization:
            return ()
        if least >= 1.0:
            return ("vLLM holds a whole model on each GPU, and this one is too large for that",)
        return (f"vLLM does not start with a share below `generation.gpu_memory_utilization={least + 0.005:.2f}`",)

    def predict(
        self, settings: Any, recipe: RunSettings, extent: Extent, workload: Workload
    ) -> Mapping[str, Took] | None:
        """Return what the phases of a stage will take; None for GPUs of unknown speed, such as those of a server."""
        if self.cluster.gpu is None or recipe.generation.vllm_server is not None:
            return None
        return Predictor(
            self.cluster,
            recipe,
            extent,
            recompute=getattr(settings, "gradient_checkpointing", False),
            is_full=getattr(settings, "adapter", "none") == "none",
        ).phases(workload)


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})
