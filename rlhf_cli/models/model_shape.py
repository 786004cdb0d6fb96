"""The sizes of a language model, and what one pass takes: bytes and operations. Imports no torch.

Operations: a multiplication and an addition are two. training/flops.py has the same counts of models in memory. Source:
Chowdhery et al. 2022 (PaLM, arXiv:2204.02311), appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from rlhf_cli.errors import ModelError
from rlhf_cli.models.config_sizes import read_sizes
from rlhf_cli.models.json_files import read_json
from rlhf_cli.models.stored_weights import read_stored_weights

FLOAT32, BFLOAT16 = 4, 2
"""Bytes of a number."""
_LOGITS_TILE = (2_048, 4_096)
"""Tokens and vocabulary entries of `generation.chunked_logprobs`."""
CACHE_BLOCK = 128
"""Tokens by which `attention.slot_cache` grows; repeated here, since that module imports torch."""


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
        heads: number of query heads; 0 where it is not known.
        key_heads: number of key heads; likewise.
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
    heads: int = 0
    key_heads: int = 0

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

    def gathered(
        self,
        number_bytes: int,
        *,
        rank: int | None = None,
        adapters: int = 1,
        trains: bool = False,
        on_cpu: bool = False,
    ) -> float:
        """Bytes that a process of a sharded run gathers in a pass: a block, the next one, and what is outside of them.

        Args:
            number_bytes: size of a number.
            rank: of adapters, which are gathered in float32 with their block; None without.
            adapters: their number.
            trains: adds gradients that are not divided yet, and those that are summed in float32: of one adapter in a
                block; without adapters those of the block, and outside the blocks.
            on_cpu: adds gloo's copy of what a message gathers or sums: a block, or what is outside of them.
        """
        block, adapter = self.backbone / self.layers, self.adapter(rank or 0) / self.layers
        found = (2 * block + self.embeddings) * number_bytes + 2 * adapters * adapter * FLOAT32
        if trains:
            found += (block + self.embeddings) * (number_bytes + FLOAT32) if rank is None else 2 * adapter * FLOAT32
        sums = trains and rank is None
        return found + (self.sent_at_once(FLOAT32 if sums else number_bytes) if on_cpu else 0.0)

    def sent_at_once(self, number_bytes: int) -> float:
        """Bytes of the largest message of a sharded run, adapters aside: a block, or what is outside of them."""
        return max(self.backbone / self.layers, float(self.embeddings)) * number_bytes

    def cache_token(self, number_bytes: int) -> int:
        """Bytes of the keys and values of a token in all layers."""
        return 2 * self.layers * self.keys * number_bytes

    def cache(self, rows: int, tokens: int, number_bytes: int) -> int:
        """Bytes of keys and values of `rows` sequences of `tokens`, and of a layer's copy as they grow, in blocks."""
        columns = -(-tokens // CACHE_BLOCK) * CACHE_BLOCK
        return 2 * rows * columns * self.keys * number_bytes * (self.layers + 1)

    def sampling(self, rows: int) -> int:
        """Bytes of logits, probabilities and float64 sums of blocks of them while a token is drawn for each row."""
        return rows * self.vocabulary * (3 * FLOAT32 + 2 * 8)
