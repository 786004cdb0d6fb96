"""Memory of a stage, from shapes and settings, before any weight is loaded. Imports no torch.

Memory is in bytes, by phase and role. `--dry-run` and `rlhf plan` read the same formulas:

    load      weights, and on a CPU the pages of the file that they are read from
    rollout   weights, moments, keys and values of the rows that are decoded, logits of a token per row
    passes    weights, moments, and the models that only score
    update    weights, moments, gradients, activations that a micro-batch saves for its backward pass, a tile of logits
    save      on a CPU: weights in float32, and the copy that is written, or read back to be compared; sharded ones are
              written and compared where they are

With `checkpoint_async: true` on a CPU, each phase of training has the copy from which a checkpoint is written. On a GPU
that copy is in host memory, which is not counted.

With `model.sharding: fsdp`, weights, gradients and moments are divided among the processes, or with
`model.sharding_size` among those of a group, and each gathers what it computes with; the pass over a micro-batch stays
whole. With `model.sharding_cpu_offload` they are in host memory, which is not counted. On a CPU gloo holds a copy of
what it gathers or sums.

Weights, gradients and moments are exact. Activations are those of a gated decoder layer as transformers computes it
(Llama), with an attention that saves no scores, or on a CPU those of short sequences. tests/gpu/test_memory.py compares
the formulas with what stages hold on a GPU, docs/performance.md with what they held on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf_cli.models.model_shape import BFLOAT16, FLOAT32, ModelShape
from rlhf_cli.settings.shared import GenerationSettings, ModelSettings, Optimizer

_MOMENTS = 2
_EIGHT_BITS = 1 + FLOAT32 / 256
"""Bytes of a number of a moment in 8 bits: a scale per 256 numbers."""
_SENT = 2**29
"""Bytes that are sent at once, see `generation.vllm_server`."""
CPU_PROCESS = 570_000_000
"""Bytes of a process that has imported torch and transformers and holds no model, on a CPU (measured)."""


@dataclass(frozen=True)
class Extent:
    """What the memory of a stage depends on besides its settings.

    Attributes:
        shape: of the model that the stage starts from.
        reward: of a reward model with a backbone of its own; None without.
        on_cpu: whether models are in the memory of the process, not of a GPU.
        process: bytes of the process without a model; counted on a CPU.
        tokens: largest micro-batch, padding included, a shared prompt once; None is what the settings allow.
        prompt: longest prompt in tokens; None is what the settings allow.
        records: that the stage trains on; None where they are not known.
        processes: of the run, on equal devices.
        machine: processes on each machine; 0 is all of them.
        device: bytes of memory of a GPU, of which vLLM takes a share; 0 where it is not known.
    """

    shape: ModelShape
    reward: ModelShape | None = None
    on_cpu: bool = False
    process: int = CPU_PROCESS
    tokens: int | None = None
    prompt: int | None = None
    records: int | None = None
    processes: int = 1
    machine: int = 0
    device: int = 0


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of a stage on one device; see the module.

    Attributes:
        phases: phase -> role -> bytes.
        mapped: roles whose weights are pages of a file, which rest during updates (`models.idle_weights`).
    """

    phases: Mapping[str, Mapping[str, int]]
    mapped: frozenset[str] = field(default_factory=frozenset)

    def of(self, phase: str) -> int:
        """Bytes in a phase."""
        return sum(self.phases.get(phase, {}).values())

    @property
    def total(self) -> int:
        """Most bytes at any one time.

        On a CPU glibc keeps what an update frees (`memory.keep_freed_memory`), so pages that are mapped for the passes
        of the next step come on top of it, of one model at a time: each rests after its use.
        """
        in_steps = 0
        if self.mapped:
            loop = [self.phases[name] for name in ("rollout", "passes", "update") if name in self.phases]
            heap = max(sum(size for role, size in phase.items() if role not in self.mapped) for phase in loop)
            pages = max(size for phase in loop for role, size in phase.items() if role in self.mapped)
            in_steps = heap + pages
        return max(in_steps, *map(self.of, self.phases))

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.of)


def memory_need(extent: Extent, phases: Mapping[str, Mapping[str, float]], *mapped: str) -> MemoryNeed:
    """Return a need, without roles of 0 bytes, and with the process where it counts."""
    process = {"process": extent.process} if extent.on_cpu else {}
    found = {
        phase: process | {role: int(size) for role, size in roles.items() if size >= 1}
        for phase, roles in phases.items()
    }
    return MemoryNeed(found, frozenset(mapped))


def shards(model: ModelSettings, extent: Extent) -> int:
    """Processes among which weights, gradients and moments are divided."""
    if model.sharding != "fsdp":
        return 1
    size = extent.machine if model.sharding_size == "machine" else model.sharding_size
    return min(size or extent.processes, extent.processes)


def own_part(model: ModelSettings, extent: Extent, size: float) -> float:
    """Bytes on a device of weights, gradients or moments of `size` bytes."""
    return 0.0 if model.sharding_cpu_offload else size / shards(model, extent)


def sent(shape: ModelShape) -> float:
    """Bytes that a process holds of the weights that it sends to a vLLM server, in float32."""
    return float(min(_SENT, FLOAT32 * shape.weights))


def vllm_least(shape: ModelShape, longest: int) -> int:
    """Bytes of all GPUs of an engine without which vLLM does not start: weights, and keys and values of a completion
    with its prompt."""
    return BFLOAT16 * shape.weights + shape.cache_token(BFLOAT16) * longest


def vllm_share(shape: ModelShape, generation: GenerationSettings, extent: Extent, longest: int) -> float:
    """Bytes of vLLM on a GPU while it draws: its share, `generation.gpu_memory_utilization`, or what it needs.

    Args:
        shape: of the policy.
        generation: section of the recipe.
        extent: of the stage.
        longest: tokens of a prompt with its completion.
    """
    least = vllm_least(shape, longest) / generation.tensor_parallel_size
    return max(generation.gpu_memory_utilization * extent.device, least)


def moments(trained: int, optimizer: Optimizer = "adamw", embeddings: int = 0) -> int:
    """Bytes of the two moments of AdamW.

    Args:
        trained: number of trained weights.
        optimizer: the setting `optimizer`.
        embeddings: number of trained weights whose moments are float32 in any case.
    """
    small = trained - embeddings if optimizer == "adamw-8bit" else 0
    return int(_MOMENTS * ((trained - small) * FLOAT32 + small * _EIGHT_BITS))


def loading(extent: Extent, weights: Mapping[str, float], parts: int = 1) -> dict[str, float]:
    """Roles of the phase `load`: weights, and on a CPU the pages of the file that the last one is read from.

    Weights that are divided into several `parts` are read block by block.
    """
    if parts > 1:
        return {**weights, "gathered": extent.shape.gathered(FLOAT32, on_cpu=extent.on_cpu)}
    return {**weights, **({"file": float(extent.shape.stored)} if extent.on_cpu else {})}


def saving(extent: Extent, kept: float = 0, parts: int = 1, *, offloads: bool = False) -> dict[str, float]:
    """Roles of the phase `save` of a whole model, which happens on the CPU: the model in float32 and its copy.

    Weights that are divided into several `parts` stay where they are: one copy in float32 takes the place of another.

    Args:
        extent: of the stage.
        kept: bytes of other models that are still in memory.
        parts: processes among which the weights are divided.
        offloads: divided weights are in host memory.
    """
    whole = FLOAT32 * extent.shape.weights
    if parts > 1:
        return {
            "policy": 0.0 if offloads else whole / parts,
            "gathered": extent.shape.gathered(FLOAT32, on_cpu=extent.on_cpu),
            "other models": kept,
        }
    return {"policy": whole, "copy to write": whole, "other models": kept} if extent.on_cpu else {}


def number_bytes(precision: str) -> int:
    """Bytes of a number in a precision; `auto` is bfloat16 on every GPU that the kernels support."""
    return FLOAT32 if precision == "float32" else BFLOAT16


def frozen_bytes(dtype: str, precision: str, quantize: str) -> float:
    """Bytes of a frozen weight under an adapter."""
    if quantize != "none":
        return {"4bit": 0.56, "8bit": 1.0}[quantize]  # NF4 with double quantization: 4.5 bits
    return number_bytes(precision if dtype == "auto" else dtype)
