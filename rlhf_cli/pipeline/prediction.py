"""How long a stage takes on GPUs that are not at hand: a prediction from data sheets, not a measurement.

Each kind of work is limited by what it needs most of: operations, bytes between a GPU and its memory, or bytes between
GPUs. Sequences are divided among the processes, so the one with the most of them counts.

    draw      C per prompt token; then the larger of C and B per token, with B = weights per step + keys and values read
    forward   C
    train     C, once more forward where activations are recomputed; and B = 28 bytes per trained weight of AdamW
    none      gradients are summed once per optimizer step: 2 x 4 bytes per trained weight, after the passes
    fsdp      weights are gathered once per forward pass and twice per training pass, gradients summed in each: 4 bytes
              per trained weight; this overlaps with C. To draw, the weights are gathered once per call
    hybrid    the same within a group, and gradients are summed over the groups in each pass
    server    weights are gathered and sent before each call, and its GPUs draw; with `ppo.overlap_rollouts` what lasts
              longer than the passes and the update of the step before

C is operations / (peak x COMPUTE), B bytes / (bandwidth x MEMORY). N bytes that W GPUs gather, or sum and divide, take
N (W - 1) / W / (bandwidth of the ring x NETWORK), as in NVIDIA's nccl-tests (doc/PERFORMANCE.md).

Not counted: loading, saving, host memory (`offload_frozen`, `sharding_cpu_offload`), what the GPUs of an engine sum in
each layer while they draw (`tensor_parallel_size`), and what Python and launches of kernels add to each token that the
torch engine draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rlhf_cli.models.gpus import GPU, Cluster
from rlhf_cli.models.model_shape import BFLOAT16, FLOAT32, ModelShape
from rlhf_cli.models.resources import Extent, number_bytes, shards, vllm_least
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.workload import Work, Workload

COMPUTE, MEMORY, NETWORK = 0.4, 0.8, 0.8
"""Shares of the published rates that are reached; docs/scale.md gives sources."""
SERVER_SHARE = 0.92
"""Default of `vllm serve --gpu-memory-utilization`."""
_MEANWHILE = ("scoring", "passes", "update")
"""Phases during which a server draws with `ppo.overlap_rollouts`."""
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
class Server:
    """A vLLM server on GPUs of its own.

    Attributes:
        cluster: its GPUs.
        engine_gpus: GPUs among which an engine divides the model; there are as many engines as the GPUs suffice for.
    """

    cluster: Cluster
    engine_gpus: int

    @staticmethod
    def on(cluster: Cluster, shape: ModelShape, longest: int) -> Server | None:
        """Return the server whose engines have as few GPUs as hold the model; None if all do not.

        Args:
            cluster: its GPUs.
            shape: of the policy.
            longest: tokens of a prompt with its completion.
        """
        least, each = vllm_least(shape, longest), SERVER_SHARE * cluster.memory
        sizes = (size for size in range(1, cluster.count + 1) if cluster.count % size == 0 and size * each >= least)
        size = next(sizes, None)
        return None if size is None else Server(cluster, size)

    @property
    def engines(self) -> int:
        """Number of copies of the model."""
        return self.cluster.count // self.engine_gpus


@dataclass(frozen=True)
class Predictor:
    """Predicts the phases of a stage.

    Attributes:
        cluster: whose GPU is listed.
        recipe: of the run, with its precision.
        extent: of the stage.
        recompute: the setting `gradient_checkpointing`.
        is_full: whether all weights are trained.
        server: draws in the place of the cluster.
    """

    cluster: Cluster
    recipe: RunSettings
    extent: Extent
    recompute: bool = False
    is_full: bool = True
    server: Server | None = None

    def phases(self, workload: Workload) -> Mapping[str, Took]:
        """Return what each phase takes; saving and works of unknown models are omitted."""
        found: dict[str, Took] = {}
        for work in workload.work:
            if work.phase != "save" and work.shape is not None:
                found[work.phase] = found.get(work.phase, Took()) + self.took(work)
        if self.recipe.value("ppo.overlap_rollouts") and "rollout" in found:
            meanwhile = sum(found[phase].total for phase in _MEANWHILE if phase in found)
            drawn = found["rollout"]
            found["rollout"] = replace(drawn, total=max(drawn.network, drawn.total - meanwhile))
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
            network = self._collective(passes * ((1 + trains) * weights + gradients), parts)
            copies = max(1, self.cluster.count // parts)
            sums = 2 * gradients / parts * (copies - 1) / copies
            network += passes * sums / (self.cluster.between * NETWORK)
            return Took(max(compute, network) + memory, compute, memory, network)
        network = self._collective(work.calls * 2 * gradients)
        return Took(compute + memory + network, compute, memory, network)

    def _drawing(self, work: Work) -> Took:
        shape = work.shape
        assert shape is not None
        server, engine_gpus = self.server, self._engine_gpus
        engines = max(1, self.cluster.count // engine_gpus) if server is None else server.engines
        own = math.ceil(work.each / engines)
        share = own / work.each
        rows = min(own, self._most_rows(work)) if self._is_vllm else min(own, work.rows)
        mean = work.tokens / (work.calls * work.each)
        steps = replace(work, each=own, rows=rows).steps(mean)
        number = BFLOAT16 if self._is_vllm else self._number_bytes
        read = steps * number * shape.weights + share * work.keys * shape.cache_token(number)
        memory = read / (self._gpu.bandwidth * _GIGA * MEMORY * engine_gpus)
        prefill = self._compute(share * work.reading) / engine_gpus
        decode = self._compute(share * (work.flops - work.reading)) / engine_gpus
        network, parts = 0.0, shards(self.recipe.model, self.extent)
        if server is not None:
            network = work.calls * self.transfer(shape)
        elif parts > 1:
            held = FLOAT32 if self._is_vllm and self.is_full else self._number_bytes
            network = self._collective(work.calls * held * shape.weights, parts)
        return Took(prefill + max(memory, decode) + network, prefill + decode, memory, network)

    def transfer(self, shape: ModelShape) -> float:
        """Seconds in which the policy's weights are gathered, one after another, and process 0 sends them.

        Adapters are merged in float32. Weights that are trained whole are stored in two halves, of which one is sent.
        """
        parts, number = shards(self.recipe.model, self.extent), self._number_bytes
        held = FLOAT32 if self.is_full else number
        products = number if self.is_full and parts == 1 else FLOAT32
        size = products * shape.backbone + held * shape.embeddings
        gathered = self._collective(held * shape.weights, parts) if parts > 1 else 0.0
        assert self.server is not None
        return gathered + size / (self.server.cluster.network * NETWORK)

    def _most_rows(self, work: Work) -> int:
        """Completions of which vLLM holds the keys at once, at the length that they have in the middle."""
        shape = work.shape
        assert shape is not None
        own = self.recipe.generation.gpu_memory_utilization if self.server is None else SERVER_SHARE
        share = own * self.cluster.memory * self._engine_gpus
        free = share - BFLOAT16 * shape.weights
        each = max(1.0, work.keys / work.tokens) * shape.cache_token(BFLOAT16)
        return max(1, int(free / each))

    def _compute(self, flops: float) -> float:
        peak = self._gpu.float32 if self.recipe.model.precision == "float32" else self._gpu.bfloat16
        return flops / (peak * COMPUTE)

    def _collective(self, size: float, among: int | None = None) -> float:
        count = among or self.cluster.count
        return 0.0 if count == 1 else size * (count - 1) / count / (self.cluster.ring(count) * NETWORK)

    @property
    def _gpu(self) -> GPU:
        assert self.cluster.gpu is not None
        return self.cluster.gpu

    @property
    def _is_vllm(self) -> bool:
        return self.recipe.generation.engine == "vllm" or self.server is not None

    @property
    def _engine_gpus(self) -> int:
        """GPUs that hold one copy of the model while it draws."""
        if self.server is not None:
            return self.server.engine_gpus
        return self.recipe.generation.tensor_parallel_size if self._is_vllm else 1

    @property
    def _number_bytes(self) -> int:
        return number_bytes(self.recipe.model.precision)
