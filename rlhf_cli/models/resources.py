"""Memory and operations of a stage, from shapes and settings, before any weight is loaded. Imports no torch.

Memory is in bytes, by phase and role. `--dry-run` and `rlhf plan` read the same formulas:

    load      weights, and on a CPU the pages of the file that they are read from
    rollout   weights, moments, keys and values of the rows that are decoded, logits of a token per row
    passes    weights, moments, and the models that only score
    update    weights, moments, gradients, activations that a micro-batch saves for its backward pass, a tile of logits
    save      on a CPU: weights in float32, and the copy that is written, or read back to be compared; sharded ones are
              written and compared where they are

With `model.sharding: fsdp`, weights, gradients and moments are divided among the processes, or with
`model.sharding_size` among those of a group, and each gathers what it computes with; the pass over a micro-batch stays
whole. With `model.sharding_cpu_offload` they are in host memory, which is not counted.

Weights, gradients and moments are exact. Activations are those of a gated decoder layer as transformers computes it
(Llama), with an attention that saves no scores, or on a CPU those of short sequences. tests/gpu/test_memory.py compares
the formulas with what stages hold on a GPU, docs/performance.md with what they held on a CPU.

Operations: a multiplication and an addition are two. See `ModelShape.forward_flops`, and training/flops.py for the
same counts of models in memory. Source: Chowdhery et al. 2022 (PaLM, arXiv:2204.02311), appendix B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from rlhf_cli.errors import ModelError
from rlhf_cli.models.config_sizes import read_sizes
from rlhf_cli.models.json_files import read_json
from rlhf_cli.models.stored_weights import read_stored_weights
from rlhf_cli.settings.shared import ModelSettings, Optimizer

FLOAT32, BFLOAT16 = 4, 2
_MOMENTS = 2
_EIGHT_BITS = 1 + FLOAT32 / 256
"""Bytes of a number of a moment in 8 bits: a scale per 256 numbers."""
_LOGITS_TILE = (2_048, 4_096)
"""Tokens and vocabulary entries of `generation.chunked_logprobs`."""
_SENT = 2**29
"""Bytes that are sent at once, see `generation.vllm_server`."""
_GROWTH = 128
"""Tokens by which the cache of `attention.slot_cache` grows."""
CPU_PROCESS = 570_000_000
"""Bytes of a process that has imported torch and transformers and holds no model, on a CPU (measured)."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a language model.

    Attributes:
        weights: number of weights.
        layers: number of decoder layers.
        hidden: size of hidden states.
        feed_forward: inner size of the feed-forward network.
        queries: size of all query heads together.
        keys: size of all key heads together.
        vocabulary: number of tokens.
        embeddings: number of weights of the embedding and of the projection to the vocabulary.
        stored: bytes of the weight files.
    """

    weights: int
    layers: int
    hidden: int
    feed_forward: int
    queries: int
    keys: int
    vocabulary: int
    embeddings: int = 0
    stored: int = 0

    @staticmethod
    def of(folder: Path) -> ModelShape | None:
        """Read the sizes from a model folder; None where its configuration or weights do not say them."""
        try:
            config = read_json(folder / "config.json")
            stored = read_stored_weights(folder).values()
        except ModelError:  # reported where the model is loaded
            return None
        shapes = [weight.shape for weight in stored]
        sizes = read_sizes(config.get("text_config", config))
        if sizes is None or not (weights := sum(map(prod, shapes))):
            return None
        return ModelShape(
            weights=weights,
            embeddings=sum(prod(shape) for shape in shapes if len(shape) == 2 and shape[0] == sizes["vocabulary"]),
            stored=sum(file.stat().st_size for file in {weight.file for weight in stored}),
            **sizes,
        )

    @staticmethod
    def required(folder: Path) -> ModelShape:
        """Read the sizes from a model folder; raises `ModelError` where it does not say them."""
        shape = ModelShape.of(folder)
        if shape is None:
            raise ModelError(
                f"{folder} does not say how large its model is",
                hint="give a model whose config.json has `hidden_size` and `num_hidden_layers`, with safetensors",
            )
        return shape

    @property
    def backbone(self) -> int:
        """Number of weights in the products of every token: all but the embedding and the projection."""
        return self.weights - self.embeddings

    def adapter(self, rank: int) -> int:
        """Number of weights of a LoRA adapter on all linear layers."""
        widths = (
            (self.hidden, self.queries),
            (self.hidden, self.keys),
            (self.hidden, self.keys),
            (self.queries, self.hidden),
            (self.hidden, self.feed_forward),
            (self.hidden, self.feed_forward),
            (self.feed_forward, self.hidden),
        )
        return self.layers * rank * sum(map(sum, widths))

    def forward_flops(self, tokens: float, *, scored: float = 0, pairs: float = 0) -> float:
        """Operations of a forward pass: 2 N T + 2 V d S + 4 L q P.

        Args:
            tokens: T tokens that the model reads; a prompt that K completions share is read once.
            scored: S tokens whose logits are computed.
            pairs: P pairs of a query and a key, masked ones included: the squared length of each sequence.
        """
        attention = 4.0 * self.layers * self.queries * pairs
        return 2.0 * self.backbone * tokens + 2.0 * self.vocabulary * self.hidden * scored + attention

    def training_flops(self, tokens: float, *, scored: float = 0, pairs: float = 0, rank: int | None = None) -> float:
        """Operations of a forward and a backward pass, for the arguments of `forward_flops`.

        All weights trained take three times the forward pass, 6 N T: it, the gradient of the inputs and that of the
        weights. Under an adapter of n weights, frozen ones have no gradient: (4 N + 6 n) T, attention as before.

        Args:
            rank: of the adapter that is trained; None trains all weights.
        """
        if rank is None:
            return 3.0 * self.forward_flops(tokens, scored=scored, pairs=pairs)
        frozen = 4.0 * (self.backbone * tokens + self.vocabulary * self.hidden * scored)
        return frozen + 6.0 * self.adapter(rank) * tokens + 12.0 * self.layers * self.queries * pairs

    def activations(
        self, tokens: int, number_bytes: int, *, recompute: bool = False, rank: int | None = None, on_cpu: bool = False
    ) -> int:
        """Bytes that a forward pass over `tokens` saves for its backward pass.

        Args:
            tokens: of a micro-batch.
            number_bytes: size of a number under autocast; norms and residuals stay in float32.
            recompute: keep only the input of each layer, and one layer's activations at a time.
            rank: of an adapter that is trained; frozen norms do not save their normalized input.
            on_cpu: attention is computed for each sequence alone, and what it returns is saved once more when joined.
        """
        norms = (4 if rank is None else 2) * self.hidden * FLOAT32  # of two norms, each its input and that normalized
        # What products and attention read: two outputs of norms; queries, keys, values and what attention returns;
        # gate, its activation, the other half and their product; of each of an adapter's seven pairs A x.
        numbers = 2 * self.hidden + (3 if on_cpu else 2) * self.queries + 2 * self.keys + 4 * self.feed_forward
        products = (numbers + 7 * (rank or 0)) * number_bytes
        if recompute:
            return tokens * (self.layers * self.hidden * FLOAT32 + norms + products)
        return tokens * self.layers * (norms + products)

    def transient(self, tokens: int, number_bytes: int) -> int:
        """Bytes of a layer's forward pass over `tokens` without gradient: its input, and a feed-forward's halves."""
        return tokens * (2 * self.hidden * FLOAT32 + 3 * self.feed_forward * number_bytes)

    def logits(self, tokens: int) -> int:
        """Bytes of the tiles of logits that a loss holds at once: logits, their softmax and their gradient."""
        return 3 * FLOAT32 * min(tokens, _LOGITS_TILE[0]) * min(self.vocabulary, _LOGITS_TILE[1])

    def gathered(self, number_bytes: int, *, trains: bool = False) -> float:
        """Bytes that a process of a sharded run gathers in a pass: a block, the next one, and what is outside of them.

        Args:
            number_bytes: size of a number.
            trains: adds gradients that are not divided yet, and those that are summed in float32: of a block, and
                outside the blocks.
        """
        block = self.backbone / self.layers
        gradients = (block + self.embeddings) * (number_bytes + FLOAT32) if trains else 0.0
        return (2 * block + self.embeddings) * number_bytes + gradients

    def cache_token(self, number_bytes: int) -> int:
        """Bytes of the keys and values of a token in all layers."""
        return 2 * self.layers * self.keys * number_bytes

    def cache(self, rows: int, tokens: int, number_bytes: int) -> int:
        """Bytes of the keys and values of `rows` sequences of `tokens`, and of one layer's copy as it grows."""
        return 2 * rows * tokens * self.keys * number_bytes * (self.layers + 1)

    def sampling(self, rows: int) -> int:
        """Bytes of logits, probabilities and float64 sums of blocks of them while a token is drawn for each row."""
        return rows * self.vocabulary * (3 * FLOAT32 + 2 * 8)


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
    """Bytes without which vLLM does not start: weights, and keys and values of a completion with its prompt."""
    return BFLOAT16 * shape.weights + shape.cache_token(BFLOAT16) * longest


def vllm_share(shape: ModelShape, share: float, extent: Extent, longest: int) -> float:
    """Bytes of vLLM while it draws: its share of the GPU, `generation.gpu_memory_utilization`, or what it needs.

    Args:
        shape: of the policy.
        share: the setting.
        extent: of the stage.
        longest: tokens of a prompt with its completion.
    """
    return max(share * extent.device, float(vllm_least(shape, longest)))


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
        return {**weights, "gathered": extent.shape.gathered(FLOAT32)}
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
            "gathered": extent.shape.gathered(FLOAT32),
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
