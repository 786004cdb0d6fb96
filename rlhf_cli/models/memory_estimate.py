"""How much memory of a GPU a stage needs, from shapes and settings, before any weight is loaded. Imports no torch.

    needed = weights + optimizer + max(gradients + activations, cache + logits)

    weights      held numbers x bytes of each; float32 where they are trained
    optimizer    two moments of AdamW per trained number, in float32 or in 8 bits
    gradients    float32, per trained number
    activations  what one micro-batch saves for its backward pass, per token and layer; and a tile of logits
    cache        keys and values of all tokens of a batch that is being decoded

It is exact for weights, gradients and optimizer. Activations are those of a gated decoder layer as transformers
computes it (Llama), with an attention that saves no scores. tests/gpu/test_memory.py compares it with what stages hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from rlhf_cli.errors import ModelError
from rlhf_cli.models.json_files import read_json
from rlhf_cli.models.stored_weights import read_stored_weights
from rlhf_cli.settings.shared import Optimizer

FLOAT32 = 4
_MOMENTS = 2
_EIGHT_BITS = 1 + FLOAT32 / 256
"""Bytes of a number of a moment in 8 bits: a scale per 256 numbers."""
_LOGITS_TILE = (2_048, 4_096)
"""Tokens and vocabulary entries of `generation.chunked_logprobs`."""


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
    """

    weights: int
    layers: int
    hidden: int
    feed_forward: int
    queries: int
    keys: int
    vocabulary: int
    embeddings: int = 0

    @staticmethod
    def of(folder: Path) -> ModelShape | None:
        """Read the sizes from a model folder; None where its configuration or weights do not say them."""
        try:
            config = read_json(folder / "config.json")
            shapes = [weight.shape for weight in read_stored_weights(folder).values()]
        except ModelError:  # reported where the model is loaded
            return None
        config = config.get("text_config", config)

        def first(*names: str, default: int = 0) -> int:
            found = (config.get(name) for name in names)
            return next((int(value) for value in found if isinstance(value, int) and value > 0), default)

        hidden, heads = first("hidden_size", "d_model", "n_embd"), first("num_attention_heads", "num_heads", "n_head")
        layers, vocabulary = first("num_hidden_layers", "num_layers", "n_layer"), first("vocab_size")
        weights = sum(map(prod, shapes))
        if not (weights and hidden and heads and layers):
            return None
        head = first("head_dim", "d_kv", default=hidden // heads)
        return ModelShape(
            weights=weights,
            layers=layers,
            hidden=hidden,
            feed_forward=first("intermediate_size", "d_ff", "n_inner", default=4 * hidden),
            queries=heads * head,
            keys=first("num_key_value_heads", default=heads) * head,
            vocabulary=vocabulary,
            embeddings=sum(prod(shape) for shape in shapes if len(shape) == 2 and shape[0] == vocabulary),
        )

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

    def activations(self, tokens: int, number_bytes: int, *, recompute: bool = False) -> int:
        """Bytes that a forward pass over `tokens` saves for its backward pass.

        Args:
            tokens: of a micro-batch.
            number_bytes: size of a number under autocast; norms and residuals stay in float32.
            recompute: keep only the input of each layer, and one layer's activations at a time.
        """
        norms = 4 * self.hidden * FLOAT32  # of two norms, each its input and its normalized input
        # What products and attention read: two outputs of norms; queries, keys, values and what attention returns;
        # gate, its activation, the other half and their product.
        products = (2 * self.hidden + 2 * self.queries + 2 * self.keys + 4 * self.feed_forward) * number_bytes
        if recompute:
            return tokens * (self.layers * self.hidden * FLOAT32 + norms + products)
        return tokens * self.layers * (norms + products)

    def logits(self, tokens: int) -> int:
        """Bytes of the tiles of logits that a loss holds at once: logits, their softmax and their gradient."""
        return 3 * FLOAT32 * min(tokens, _LOGITS_TILE[0]) * min(self.vocabulary, _LOGITS_TILE[1])

    def cache(self, rows: int, tokens: int, number_bytes: int) -> int:
        """Bytes of the keys and values of `rows` sequences of `tokens`, and of one layer's copy as it grows."""
        return 2 * rows * tokens * self.keys * number_bytes * (self.layers + 1)

    def sampling(self, rows: int) -> int:
        """Bytes of logits, probabilities and float64 sums of blocks of them while a token is drawn for each row."""
        return rows * self.vocabulary * (3 * FLOAT32 + 2 * 8)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of a stage on one device; see the module.

    Attributes:
        weights: of all models that are held.
        gradients: of what is trained.
        optimizer: its moments.
        activations: of one micro-batch, with its logits.
        decoding: cache and logits of a batch that is being decoded.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    decoding: int = 0

    @property
    def total(self) -> int:
        """Most bytes at any one time."""
        return self.weights + self.optimizer + max(self.gradients + self.activations, self.decoding)


def training_need(
    *,
    trained: int,
    frozen: int,
    frozen_bytes: float,
    activations: int,
    optimizer: Optimizer = "adamw",
    embeddings: int = 0,
    decoding: int = 0,
    offloads: bool = False,
) -> MemoryNeed:
    """Return the need of a stage that trains.

    Args:
        trained: number of trained weights, of all models together.
        frozen: number of frozen weights, of all models together.
        frozen_bytes: bytes of each.
        activations: bytes of one micro-batch.
        optimizer: the setting `optimizer`.
        embeddings: number of trained weights whose moments are float32 in any case.
        decoding: bytes of a batch that is being decoded.
        offloads: frozen weights are on the device only while they are used; they are no more than the gradients, which
            are not there then.
    """
    small = trained - embeddings if optimizer == "adamw-8bit" else 0
    return MemoryNeed(
        weights=trained * FLOAT32 + (0 if offloads else int(frozen * frozen_bytes)),
        gradients=trained * FLOAT32,
        optimizer=int(_MOMENTS * ((trained - small) * FLOAT32 + small * _EIGHT_BITS)),
        activations=activations,
        decoding=decoding,
    )


def number_bytes(precision: str) -> int:
    """Bytes of a number in a precision; `auto` is bfloat16 on every GPU that the kernels support."""
    return FLOAT32 if precision == "float32" else 2


def frozen_bytes(dtype: str, precision: str, quantize: str) -> float:
    """Bytes of a frozen weight under an adapter."""
    if quantize != "none":
        return {"4bit": 0.56, "8bit": 1.0}[quantize]  # NF4 with double quantization: 4.5 bits
    return number_bytes(precision if dtype == "auto" else dtype)
