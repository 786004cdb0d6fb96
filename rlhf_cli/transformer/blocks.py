"""A block: self-attention, cross-attention if there is an encoder, and feed-forward, each with its norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_cli.cache_names import takes_cache
from rlhf_cli.transformer.config import TransformerConfig
from rlhf_cli.transformer.feed_forward import make_feed_forward
from rlhf_cli.transformer.multi_head import MultiHeadAttention
from rlhf_cli.transformer.norms import make_norm
from rlhf_cli.transformer.positions import Rotation

TensorMap = Callable[[Tensor], Tensor]


def residual(x: Tensor, sublayer: TensorMap, norm: TensorMap, placement: str) -> Tensor:
    """Add a residual connection and a norm to a sublayer.

    post    LayerNorm(x + Sublayer(x))    Vaswani et al. 2017, section 3.1
    pre     x + Sublayer(LayerNorm(x))    GPT-2; easier to train (Xiong et al. 2020, arXiv:2002.04745)

    Args:
        x: (B, T, d).
        sublayer: attention or feed-forward.
        norm: its norm.
        placement: "post" or "pre".
    """
    if placement == "post":
        return norm(x + sublayer(x))
    return x + sublayer(norm(x))


class Block(GradientCheckpointingLayer):
    """One of the N layers of Vaswani et al. 2017, figure 1: the left one, or with `has_cross` the right one.

    Args:
        config: parts and sizes.
        layer: index of the block.
        is_causal: self-attention does not see later positions.
        has_cross: a third sublayer, between the other two, attends to the encoder's output.
    """

    def __init__(self, config: TransformerConfig, layer: int, *, is_causal: bool, has_cross: bool) -> None:
        super().__init__()
        self.placement = config.norm_placement
        self.self_attention = MultiHeadAttention(config, layer, is_causal=is_causal)
        self.self_attention_norm = make_norm(config)
        self.has_cross = has_cross
        if has_cross:
            self.cross_attention = MultiHeadAttention(config, layer, is_causal=False, is_cross=True)
            self.cross_attention_norm = make_norm(config)
        self.feed_forward = make_feed_forward(config)
        self.feed_forward_norm = make_norm(config)

    @takes_cache
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        angles: Rotation | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Transform hidden states.

        Args:
            x: (B, T, d).
            memory: (B, S, d), the encoder's output, for blocks with cross-attention.
            attention_mask: mask of self-attention.
            memory_mask: mask of cross-attention.
            angles: rotary positions.
            cache: of keys and values.
            kwargs: arguments for the backend of self-attention.

        Returns:
            (B, T, d).
        """

        def attend(x: Tensor) -> Tensor:
            own = getattr(cache, "self_attention_cache", cache)
            return self.self_attention(x, attention_mask=attention_mask, angles=angles, cache=own, **kwargs)[0]

        def attend_to_memory(x: Tensor) -> Tensor:
            return self.cross_attention(x, memory, attention_mask=memory_mask, cache=cache)[0]

        x = residual(x, attend, self.self_attention_norm, self.placement)
        if self.has_cross:
            x = residual(x, attend_to_memory, self.cross_attention_norm, self.placement)
        return residual(x, self.feed_forward, self.feed_forward_norm, self.placement)
