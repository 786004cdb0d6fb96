"""Multi-head attention: projections and heads. Any registered backend computes softmax(Q K^T / sqrt(d_k)) V."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf_cli.transformer.config import TransformerConfig
from rlhf_cli.transformer.positions import Rotation, rotate


def scaled_dot_product_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V (Vaswani et al. 2017, equation 1): the `eager` implementation.

    Args:
        module: the attention module; read by other implementations, unused here.
        query: (B, H, Tq, D).
        key, value: (B, G, Tk, D); query head h reads head h // (H / G).
        attention_mask: (B, 1, Tq, Tk), added to the scores: the lowest number where a query must not attend; or None.
        scaling: 1 / sqrt(d_k).
        kwargs: arguments of other implementations.

    Returns:
        (B, Tq, H, D), and the weights (B, H, Tq, Tk).
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2), weights


class MultiHeadAttention(nn.Module):
    """MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O, head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V).

    Vaswani et al. 2017, section 3.2.2; with fewer key than query heads, Ainslie et al. 2023 (arXiv:2305.13245).

    Args:
        config: sizes, heads, biases and, in `_attn_implementation`, the backend.
        layer: index of the block, also in a cache.
        is_causal: a position does not see later ones.
        is_cross: keys and values come from the encoder's output.
    """

    def __init__(self, config: TransformerConfig, layer: int, *, is_causal: bool, is_cross: bool = False) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.config = config
        self.head_dim = config.head_dim
        self.layer_idx = layer
        self.is_causal = is_causal  # backends read this and the next two attributes by name
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_cross = is_cross
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_biases)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_biases)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_biases)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_biases)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        angles: Rotation | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `x` to itself or to `memory`.

        Args:
            x: (B, Tq, d), source of queries.
            memory: (B, Tk, d), source of keys and values in cross-attention; None is `x`.
            attention_mask: from the backend's mask function.
            angles: rotary positions of `x`; none in cross-attention, whose two sequences have separate positions.
            cache: cached keys and values of earlier calls; this call appends its own.
            kwargs: arguments for the backend, such as `attention_layout`.

        Returns:
            (B, Tq, d), and the weights (B, H, Tq, Tk) if the backend returns them.
        """
        query = self._heads(self.q_proj(x))
        if self.is_cross:
            assert memory is not None
            key, value = self._memory_heads(memory, cache)
        else:
            key, value = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
            if angles is not None:
                query, key = rotate(query, angles), rotate(key, angles)
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            str(self.config._attn_implementation), scaled_dot_product_attention
        )
        output, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(2)), weights

    def _heads(self, projected: Tensor) -> Tensor:
        """Split heads: (B, T, heads * D) -> (B, heads, T, D)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _memory_heads(self, memory: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Project the encoder's output to keys and values, only once for all steps of a generation."""
        if isinstance(cache, EncoderDecoderCache) and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]
        key, value = self._heads(self.k_proj(memory)), self._heads(self.v_proj(memory))
        if isinstance(cache, EncoderDecoderCache):
            key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return key, value
