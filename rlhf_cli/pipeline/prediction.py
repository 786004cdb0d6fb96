"""How long a stage takes on GPUs that are not at hand: a prediction from data sheets, not a measurement.

Each kind of work is limited by what it needs most of: operations, bytes between a GPU and its memory, or bytes between
GPUs. Sequences are divided among the processes, so the one with the most of them counts.

    draw      C per prompt token; then the larger of C and B per token, with B = weights per step + keys and values read
    forward   C
    train     C, once more forward where activations are recomputed; and B = 28 bytes per trained weight of AdamW
    none      gradients are summed once per optimizer step: 2 x 4 bytes per trained weight, after the passes
    fsdp      weights are gathered once per forward pass and twice per training pass, gradients summed in each: 4 bytes
              per trained weight; this overlaps with C. To draw, the weights are gathered once per call

C is operations / (peak x COMPUTE), B bytes / (bandwidth x MEMORY). N bytes that W GPUs gather, or sum and divide, take
N (W - 1) / W / (bandwidth of the ring x NETWORK), as in NVIDIA's nccl-tests (doc/PERFORMANCE.md).

Not counted: loading, saving, host memory (`offload_frozen`), and what Python and the launches of kernels add to each
token that the torch engine draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rlhf_cli.models.gpus import GPU, Cluster
from rlhf_cli.models.resources import BFLOAT16, FLOAT32, Extent, number_bytes, shards
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.workload import Work, Workload

COMPUTE, MEMORY, NETWORK = 0.4, 0.8, 0.8
"""Shares of the published rates that are reached; docs/scale.md gives sources."""
_ADAMW = 28
"""Bytes per trained weight of a step: weight, gradient and two moments read, all but the gradient written, in 4."""
_GIGA = 1e9


@dataclass(frozen=True)
class Took:
    """Predicted seconds of a phase.

    Attributes:
        total: of the phase, in which some of the following overlap.
        compute: of operations.
        memory: of bytes between the GPU and its memory.
        network: of bytes between GPUs.
    """

    total: float = 0.0
    compute: float = 0.0
    memory: float = 0.0
    network: float = 0.0

    def __add__(self, other: Took) -> Took:
        return Took(
            self.total + other.total,
            self.compute + other.compute,
            self.memory + other.memory,
            self.network + other.network,
        )

    @property
    def limit(self) -> str:
        """What most of the time is needed for."""
        kinds = {"compute": self.compute, "memory bandwidth": self.memory, "interconnect": self.network}
        return max(kinds, key=lambda kind: kinds[kind])


@dataclass(frozen=True)
class Predictor:
    """Predicts the phases of a stage.

    Attributes:
        cluster: whose GPU is listed.
        recipe: of the run, with its precision.
        extent: of the stage.
        recompute: the setting `gradient_checkpointing`.
        is_full: whether all weights are trained.
        engine_gpus: GPUs that hold one copy of the model while it draws. Ours holds one on each; other programs divide
            it.
    """

    cluster: Cluster
    recipe: RunSettings
    extent: Extent
    recompute: bool = False
    is_full: bool = True
    engine_gpus: int = 1

    def phases(self, workload: Workload) -> Mapping[str, Took]:
        """Return what each phase takes; saving and works of unknown models are omitted."""
        found: dict[str, Took] = {}
        for work in workload.work:
            if work.phase != "save" and work.shape is not None:
                found[work.phase] = found.get(work.phase, Took()) + self.took(work)
        return found

    def took(self, work: Work) -> Took:
        """Return what a work takes on the process that has most of it."""
        return self._drawing(work) if work.kind == "draw" else self._passes(work)

    def _passes(self, work: Work) -> Took:
        shape, gpu = work.shape, self._gpu
        assert shape is not None
        own = math.ceil(work.each / self.cluster.count)
        flops, passes = work.flops * own / work.each, work.calls * math.ceil(own / work.rows)
        trains = work.kind == "train"
        if trains and self.recompute:
            flops *= 4 / 3 if self.is_full else 3 / 2  # a forward pass is 2 N of 6 N, or of 4 N under an adapter
        compute = self._compute(flops)
        parts = shards(self.recipe.model, self.extent)
        memory = work.calls * _ADAMW * work.trained / parts / (gpu.bandwidth * _GIGA * MEMORY) if trains else 0.0
        weights, gradients = self._number_bytes * shape.weights, FLOAT32 * work.trained
        if parts > 1:
            network = self._collective(passes * ((1 + trains) * weights + gradients))
            return Took(max(compute, network) + memory, compute, memory, network)
        network = self._collective(work.calls * 2 * gradients)
        return Took(compute + memory + network, compute, memory, network)

    def _drawing(self, work: Work) -> Took:
        shape = work.shape
        assert shape is not None
        engines = max(1, self.cluster.count // self.engine_gpus)
        own = math.ceil(work.each / engines)
        share = own / work.each
        rows = min(own, self._most_rows(work)) if self._is_vllm else min(own, work.rows)
        mean = work.tokens / (work.calls * work.each)
        steps = replace(work, each=own, rows=rows).steps(mean)
        number = BFLOAT16 if self._is_vllm else self._number_bytes
        read = steps * number * shape.weights + share * work.keys * shape.cache_token(number)
        memory = read / (self._gpu.bandwidth * _GIGA * MEMORY * self.engine_gpus)
        prefill = self._compute(share * work.reading) / self.engine_gpus
        decode = self._compute(share * (work.flops - work.reading)) / self.engine_gpus
        network = 0.0
        if shards(self.recipe.model, self.extent) > 1:
            network = self._collective(work.calls * self._number_bytes * shape.weights)
        return Took(prefill + max(memory, decode) + network, prefill + decode, memory, network)

    def _most_rows(self, work: Work) -> int:
        """Completions of which vLLM holds the keys at once, at the length that they have in the middle."""
        shape = work.shape
        assert shape is not None
        share = self.recipe.generation.gpu_memory_utilization * self.cluster.memory * self.engine_gpus
        free = share - BFLOAT16 * shape.weights
        each = max(1.0, work.keys / work.tokens) * shape.cache_token(BFLOAT16)
        return max(1, int(free / each))

    def _compute(self, flops: float) -> float:
        peak = self._gpu.float32 if self.recipe.model.precision == "float32" else self._gpu.bfloat16
        return flops / (peak * COMPUTE)

    def _collective(self, size: float) -> float:
        count = self.cluster.count
        return 0.0 if count == 1 else size * (count - 1) / count / (self.cluster.bandwidth * NETWORK)

    @property
    def _gpu(self) -> GPU:
        assert self.cluster.gpu is not None
        return self.cluster.gpu

    @property
    def _is_vllm(self) -> bool:
        return self.recipe.generation.engine == "vllm"

    @property
    def _number_bytes(self) -> int:
        return number_bytes(self.recipe.model.precision)
