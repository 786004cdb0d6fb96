"""Our backends inside Hugging Face models.

A model that honours transformers' `AttentionInterface` calls our function in every layer. Who sees whom comes from the
first of four places that says so: the layout that the model's caller gave (`attention_layout`, for packed rows and
prefix trees), the boundaries of TRL's packing (`cu_seq_lens_q` and `cu_seq_lens_k`), the layout that our mask function
made of a padding mask, a cache or positions that start again, and, where the model made no mask, the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from rlhf_cli.attention import registry
from rlhf_cli.attention.layout import Layout
from rlhf_cli.errors import ModelError

# transformers takes names that hold "flash", "sdpa" or "flex" for its own, and names with a slash for hub kernels.
_PREFIX = "rlhf_"

_watchers: list[Callable[[nn.Module, dict[str, Any]], None]] = []


def implementation(name: str) -> str:
    """Register a backend with transformers.

    Args:
        name: a backend's name, `auto`, or `package.module:function`.

    Returns:
        The name to give as `attn_implementation`.

    Raises:
        UsageError: there is no such backend.
    """
    if name != registry.AUTO:
        registry.find(name)
    known = _PREFIX + re.sub("flash|sdpa|flex|paged", "x", re.sub(r"\W", "_", name))

    def attend(module: nn.Module, *tensors: Any, **arguments: Any) -> tuple[Tensor, None]:
        return attention_forward(module, *tensors, backend=name, **arguments)

    AttentionInterface.register(known, attend)
    AttentionMaskInterface.register(known, attention_mask)  # pyright: ignore[reportArgumentType]
    return known


def is_ours(model: nn.Module) -> bool:
    """Whether a Hugging Face model computes its attention by one of our backends."""
    return str(getattr(model.config, "_attn_implementation", "")).startswith(_PREFIX)


@contextmanager
def watching(watcher: Callable[[nn.Module, dict[str, Any]], None]) -> Iterator[None]:
    """Call `watcher` with the module and the arguments of every attention while the context lasts."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    attention_layout: Layout | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer.

    Args:
        module: the model's attention module.
        query: (B, H, Lq, D).
        key: (B, G, Lk, D), the cache included.
        value: (B, G, Lk, Dv).
        attention_mask: what `attention_mask` below returned, a mask (B, 1, Lq, Lk) the caller made, or None.
        backend: name of ours.
        scaling: factor on the scores.
        dropout: must be 0.
        is_causal: overrides the module's own.
        sliding_window: see `contract`.
        softcap: see `contract`.
        s_aux: (H,) sinks.
        position_bias: added to the scores (T5).
        attention_layout: from the caller of the model.
        cu_seq_lens_q: (S + 1,) boundaries of packed sequences, B = 1.
        cu_seq_lens_k: likewise of keys.

    Returns:
        Output (B, Lq, H, Dv), and None for the weights.
    """
    if dropout:
        raise ModelError(
            f"attention dropout of {dropout:g} is not supported by our backends",
            hint="set it to 0 in the model's configuration; RLHF trains without dropout",
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bias = position_bias
    if attention_layout is not None:
        layout = attention_layout
    elif cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        layout = _of_boundaries(cu_seq_lens_q, cu_seq_lens_k, query.shape[2], key.shape[2])
    elif attention_mask is None:
        layout = _dense(query.shape[0], query.shape[2], key.shape[2])
    elif attention_mask.dim() == 4:
        layout, causal, sliding_window = _dense(query.shape[0], query.shape[2], key.shape[2]), False, None
        bias = _added(bias, attention_mask, query.dtype)
    else:
        layout = _of_mask(attention_mask, query, key)
        causal = getattr(attention_mask, "rlhf_is_causal", causal)
    _check(layout, query, key)
    arguments: dict[str, Any] = {
        "scale": scaling,
        "causal": causal,
        "window": sliding_window,
        "softcap": softcap,
        "sinks": s_aux,
        "bias": bias,
    }
    for watcher in _watchers:
        watcher(module, {"query": query, "key": key, "value": value, "layout": layout, **arguments})
    output = registry.attention(query, key, value, layout, backend=backend, **arguments).output
    return output.transpose(1, 2), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **_: Any,
) -> Tensor:
    """What transformers calls once a forward pass, to make the mask that our function then gets.

    The mask is (B, Lk) and True on real keys; the layout it stands for travels with it as an attribute.

    Args:
        batch_size: B.
        q_length: Lq.
        kv_length: Lk, slots of a static cache that nothing was written to included.
        q_offset: tokens that came before the first query.
        kv_offset: tokens that a sliding cache dropped before the first key.
        mask_function: whether query i of batch row b may see key j: f(b, head, i, j).
        attention_mask: (B, tokens so far) True on real ones.
        device: of the mask.
        use_vmap: whether the model put a mask function of its own into `mask_function`.

    Raises:
        ModelError: the model asks for a mask that is no layout.
    """
    if attention_mask is not None and hasattr(attention_mask, "rlhf_layout"):
        return attention_mask  # `generate` made it already, for a static cache
    if use_vmap:
        raise ModelError("the model adds a mask of its own, which our attention layouts cannot describe")
    offset = int(q_offset)
    columns = torch.arange(kv_offset, kv_offset + kv_length, device=device)
    is_cross = mask_function is bidirectional_mask_function  # or an encoder, whose queries are all real or unread
    is_written = torch.ones_like(columns, dtype=torch.bool) if is_cross else columns < offset + q_length
    is_real = is_written.expand(batch_size, -1)
    if attention_mask is not None:
        given = attention_mask.to(device=device, dtype=torch.bool)
        inside = columns < given.shape[1]
        is_real = is_real & inside & given[:, columns.clamp(max=given.shape[1] - 1)]
    mask = is_real.contiguous()
    if is_cross:
        found, mask.rlhf_is_causal = Layout.cross(q_length, mask), False  # pyright: ignore[reportAttributeAccessIssue]
    else:
        mask.rlhf_is_causal, starts = _looks(mask_function, batch_size, q_length, device)  # pyright: ignore
        found = _padded(mask, q_length, offset - kv_offset) if not starts.any() else _cut(starts)
    mask.rlhf_layout = found  # pyright: ignore[reportAttributeAccessIssue]
    return mask


def _looks(mask_function: Callable[..., Any], batch: int, length: int, device: Any) -> tuple[bool, Tensor]:
    """Whether a mask function is causal, and where it starts a new sequence inside a row: (B, L) bool.

    transformers hands over functions of indices. That a query does not see the token before it is how packed rows show
    (found by transformers in positions that start again), and chunked attention too.
    """
    starts = torch.zeros(batch, length, dtype=torch.bool, device=device)
    if mask_function is causal_mask_function or length == 1:
        return True, starts
    rows = torch.arange(batch, device=device).unsqueeze(1)
    later = torch.arange(1, length, device=device).unsqueeze(0)
    sees_before = torch.as_tensor(mask_function(rows, 0, later, later - 1), device=device)
    sees_behind = torch.as_tensor(mask_function(rows, 0, later - 1, later), device=device)
    starts[:, 1:] = ~sees_before
    return not bool(sees_behind.any()), starts


def _cut(starts: Tensor) -> Layout:
    rows = []
    for row in starts.tolist():
        edges = [0, *(at for at, is_start in enumerate(row) if is_start), len(row)]
        rows.append([end - start for start, end in pairwise(edges)])
    return Layout.packed(rows, width=starts.shape[1])


def _padded(is_real: Tensor, query_length: int, query_offset: int) -> Layout:
    batch, keys = is_real.shape
    if query_offset + query_length == keys and bool(is_real.all()):
        return _dense(batch, query_length, keys)
    try:
        return Layout.padded(is_real, query_length=query_length, query_offset=query_offset)
    except ValueError as error:
        raise ModelError(str(error), hint="put all padding of a row on one side, or use `--attention sdpa`") from None


@lru_cache(maxsize=8)
def _dense(batch: int, queries: int, keys: int) -> Layout:
    return Layout.dense(batch, queries, keys)


def _of_mask(mask: Tensor, query: Tensor, key: Tensor) -> Layout:
    """The layout that came with a mask; made anew where the mask was copied on its way."""
    found = getattr(mask, "rlhf_layout", None)
    if isinstance(found, Layout):
        return found
    written = int(mask.bool().any(0).nonzero().max()) + 1 if bool(mask.any()) else key.shape[2]
    return _padded(mask.bool(), query.shape[2], max(0, written - query.shape[2]))


def _of_boundaries(queries: Tensor, keys: Tensor, query_length: int, key_length: int) -> Layout:
    found = getattr(queries, "rlhf_layout", None)
    if not isinstance(found, Layout):
        found = Layout.bounded(queries.tolist(), keys.tolist(), query_length, key_length)
        queries.rlhf_layout = found  # pyright: ignore[reportAttributeAccessIssue]
    return found


def _added(bias: Tensor | None, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (B, 1, Lq, Lk), bool or to be added, as a bias; the model's lowest number means hidden."""
    if mask.dtype == torch.bool:
        hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    else:
        hidden = mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
    return hidden if bias is None else bias + hidden


def _check(layout: Layout, query: Tensor, key: Tensor) -> None:
    expected = (query.shape[0], query.shape[2], key.shape[2])
    if (found := (layout.batch, layout.query_length, layout.key_length)) != expected:
        raise ModelError(
            f"the attention layout is for (batch, queries, keys) {found}, but the model asks for {expected}",
            hint="a layout of packed rows or prefix trees serves a forward pass without a cache",
        )
