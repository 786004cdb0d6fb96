"""Machines that `rlhf plan` plans for in the place of this one (`--gpu`), with what it then assumes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhf_cli.errors import UsageError
from rlhf_cli.models.gpus import Cluster
from rlhf_cli.models.model_shape import BFLOAT16, ModelShape
from rlhf_cli.models.resources import Extent, vllm_least
from rlhf_cli.pipeline.prediction import SERVER_SHARE, Predictor, Server, Took
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.settings.shared import OUR_ATTENTION
from rlhf_cli.stages.generation import check_drawing
from rlhf_cli.stages.inputs import Input
from rlhf_cli.stages.sharding import check_groups, check_sharding
from rlhf_cli.stages.workload import Workload


@dataclass(frozen=True)
class Target:
    """What is planned for.

    Attributes:
        cluster: the GPUs.
        shape: sizes of all models; None takes those of the recipe.
        server_gpus: further GPUs of the same product, of `generation.vllm_server`; 0 if they are not known.
    """

    cluster: Cluster
    shape: ModelShape | None = None
    server_gpus: int = 0

    def here(self, recipe: Recipe) -> Recipe:
        """Return the recipe with which this machine can read data and models."""
        changes: dict[str, Any] = {"device": "cpu", "sharding": "none"}
        changes |= {"sharding_size": None, "sharding_cpu_offload": False}
        if recipe.model.precision == "auto":
            changes["precision"] = "bfloat16"
        if recipe.model.attention in OUR_ATTENTION:
            changes["attention"] = "auto"
        generation = recipe.generation.model_copy(update={"engine": "torch", "vllm_server": None})
        return _changed(recipe, changes).model_copy(update={"generation": generation})

    def check(self, recipe: Recipe, stages: set[str], inputs: Iterable[Input]) -> None:
        """Raise `UsageError` if these machines cannot do what the recipe says for the stages that run, with inputs."""
        check_sharding(recipe, stages)
        if self.server_gpus and recipe.generation.vllm_server is None:
            raise UsageError(
                "`--server-gpus` needs `generation.vllm_server`",
                hint="add `--set generation.vllm_server=http://HOST:8000`; no server needs to run there",
            )
        of_machine = self.cluster.count // self.cluster.nodes
        check_groups(recipe.model, self.cluster.count, of_machine)
        check_drawing(recipe, inputs, self.cluster.count, of_machine)

    def there(self, here: Recipe, asked: Recipe) -> Recipe:
        """Return the recipe that the formulas count with: `here`, with what is only used on the other machines."""
        names = ("sharding", "sharding_size", "sharding_cpu_offload")
        changed = _changed(here, {name: getattr(asked.model, name) for name in names})
        return changed.model_copy(update={"generation": asked.generation})

    def extent(self, extent: Extent, workload: Workload) -> Extent:
        """Return the extent of a stage on these GPUs; a micro-batch has at most what is a process's own."""
        tokens = extent.tokens
        training = [work for work in workload.work if work.kind == "train"]
        if tokens is not None and training:
            own = min(math.ceil(work.each / self.cluster.count) / work.rows for work in training)
            tokens = math.ceil(tokens * min(1.0, own))
        count, nodes = self.cluster.count, self.cluster.nodes
        return replace(
            extent, on_cpu=False, tokens=tokens, processes=count, machine=count // nodes,
            device=int(self.cluster.memory),
        )  # fmt: skip

    def notes(self, recipe: RunSettings, extent: Extent, workload: Workload) -> tuple[str, ...]:
        """Return what is not counted, what a vLLM server holds, and the share of a GPU without which vLLM does not
        start."""
        offload = "times do not count what `model.sharding_cpu_offload` copies, nor the optimizer on the CPU"
        found = (offload,) if recipe.model.sharding_cpu_offload else ()
        return (*found, *self._of_vllm(recipe, extent, workload))

    def _of_vllm(self, recipe: RunSettings, extent: Extent, workload: Workload) -> tuple[str, ...]:
        longest = [work.longest for work in workload.work if work.kind == "draw"]
        if recipe.generation.vllm_server is not None:
            return (self._of_server(extent, workload),) if longest else ()
        if recipe.generation.engine != "vllm" or not longest:
            return ()
        size = recipe.generation.tensor_parallel_size
        least = vllm_least(extent.shape, (extent.prompt or 0) + max(longest)) / size / self.cluster.memory
        if least <= recipe.generation.gpu_memory_utilization:
            return ()
        if least >= 1.0:
            held = "a whole model on each GPU" if size == 1 else f"a model on {size} GPUs"
            more = "`generation.tensor_parallel_size` divides it among more"
            return (f"vLLM holds {held}, and this one is too large for that; {more}",)
        return (f"vLLM does not start with a share below `generation.gpu_memory_utilization={least + 0.005:.2f}`",)

    def _of_server(self, extent: Extent, workload: Workload) -> str:
        """Return what is on a GPU of the server."""
        if not self.server_gpus:
            return "times are not predicted with `generation.vllm_server`: give its GPUs with `--server-gpus`"
        server, memory = self.server(extent, workload), self.cluster.memory
        if server is None:
            return f"the model is too large for a vLLM server on {self.server_gpus} x {self.cluster.name}"
        weights = BFLOAT16 * extent.shape.weights / server.engine_gpus
        return (
            f"vLLM server: {server.engines} x {server.engine_gpus} GPUs (`--data-parallel-size`, "
            f"`--tensor-parallel-size`); each holds {weights / 1e9:,.1f} GB of weights and up to "
            f"{(SERVER_SHARE * memory - weights) / 1e9:,.1f} GB of keys and values"
        )

    def server(self, extent: Extent, workload: Workload) -> Server | None:
        """Return the vLLM server; None without one, or where the model is too large for it."""
        longest = [work.longest for work in workload.work if work.kind == "draw"]
        if not self.server_gpus or not longest:
            return None
        cluster = replace(self.cluster, count=self.server_gpus, nodes=1)
        return Server.on(cluster, extent.shape, (extent.prompt or 0) + max(longest))

    def predict(
        self, settings: Any, recipe: RunSettings, extent: Extent, workload: Workload
    ) -> Mapping[str, Took] | None:
        """Return what the phases of a stage will take; None for GPUs of unknown speed, or a server without GPUs."""
        server = None
        if recipe.generation.vllm_server is not None and any(work.kind == "draw" for work in workload.work):
            server = self.server(extent, workload)
            if server is None:
                return None
        if self.cluster.gpu is None:
            return None
        return Predictor(
            self.cluster,
            recipe,
            extent,
            recompute=getattr(settings, "gradient_checkpointing", False),
            is_full=getattr(settings, "adapter", "none") == "none",
            server=server,
        ).phases(workload)


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})
