"""Our backends inside Hugging Face models.

A model that honors transformers' `AttentionInterface` calls our function in every layer. Who sees whom comes from the
first of four places that says so: the layout that the model's caller gave (`attention_layout`, for packed rows and
prefix trees), the boundaries of TRL's packing (`cu_seq_lens_q` and `cu_seq_lens_k`), the layout that our mask function
made of a padding mask, a cache or positions that start again, and, where the model made no mask, the shapes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from rlhf_cli.attention import registry
from rlhf_cli.attention.layout import Layout
from rlhf_cli.attention.masks import MaskFunction, Visibility, padded
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
    plain = re.sub("flash|sdpa|flex|paged", "x", re.sub(r"\W", "_", name))
    # Two functions of users may look alike without their punctuation.
    known = _PREFIX + plain + (f"_{hashlib.sha256(name.encode()).hexdigest()[:8]}" if ":" in name else "")

    def attend(module: nn.Module, *tensors: Any, **arguments: Any) -> tuple[Tensor, None]:
        return attention_forward(module, *tensors, backend=name, **arguments)  # pyright: ignore[reportCallIssue]

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


@torch.compiler.disable
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
        scaling, sliding_window, softcap: `scale`, `window` and `softcap` of `contract`.
        dropout: must be 0.
        is_causal: overrides the module's own.
        s_aux: (H,) sinks.
        position_bias: added to the scores (T5).
        attention_layout: from the caller of the model.
        cu_seq_lens_q, cu_seq_lens_k: (S + 1,) boundaries of packed sequences, B = 1.

    Returns:
        Output (B, Lq, H, Dv), and None for the weights.
    """
    _refuse_dropout(dropout)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bias = position_bias
    if attention_layout is not None:
        seen = Visibility(attention_layout, causal, sliding_window)
    elif cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        layout = _of_boundaries(cu_seq_lens_q, cu_seq_lens_k, query.shape[2], key.shape[2])
        seen = Visibility(layout, causal, sliding_window)
    else:
        layout = Layout.dense(query.shape[0], query.shape[2], key.shape[2])
        seen, hidden = _of_mask(attention_mask, Visibility(layout, causal, sliding_window))
        if hidden is not None:
            bias = hidden.to(query.dtype) if bias is None else bias + hidden.to(bias.dtype)
    _check(seen.layout, query, key)
    arguments: dict[str, Any] = {
        "scale": scaling,
        "causal": seen.causal,
        "window": seen.window,
        "softcap": softcap,
        "sinks": s_aux,
        "bias": bias,
    }
    for watcher in _watchers:
        watcher(module, {"query": query, "key": key, "value": value, "layout": seen.layout, **arguments})
    output = registry.attention(query, key, value, seen.layout, backend=backend, **arguments).output
    return output.transpose(1, 2), None


@torch.compiler.disable
def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> Tensor:
    """What transformers calls once a forward pass, to make the mask that our function then gets.

    The mask is (B, Lk) and True on real keys; what it stands for travels with it as an attribute.

    Args:
        batch_size: B.
        q_length: Lq.
        kv_length: Lk, slots of a static cache that nothing was written to included.
        q_offset: tokens that came before the first query.
        kv_offset: tokens that a sliding cache dropped before the first key.
        mask_function: whether query i of batch row b may see key j: f(b, head, i, j).
        attention_mask: (B, tokens so far) True on real ones.
        device: of the mask.
        local_size: window or chunk that `mask_function` has.
        use_vmap: whether the model put a mask function of its own into `mask_function`.

    Raises:
        ModelError: the model asks for a mask that is no layout.
    """
    if attention_mask is not None and hasattr(attention_mask, _ATTRIBUTE):
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
        found = Visibility(Layout.cross(q_length, mask), False, None)
    elif mask_function is causal_mask_function:
        found = Visibility(padded(mask, q_length, offset - kv_offset), True, None)
    else:
        asked = MaskFunction(
            mask_function, batch_size, offset, q_length, kv_offset, kv_length, local_size, torch.device(device)
        )
        found = asked.visibility(mask)
    setattr(mask, _ATTRIBUTE, found)
    return mask


_ATTRIBUTE = "rlhf_visibility"


def _of_mask(mask: Tensor | None, plain: Visibility) -> tuple[Visibility, Tensor | None]:
    """What a mask stands for, and what it adds to the scores.

    Args:
        mask: ours, (B, Lk); one the caller made, (B, 1, Lq, Lk); or None.
        plain: what the shapes and the model's own arguments say.
    """
    if mask is None:
        return plain, None
    if mask.dim() == 4:  # it says all there is to say about causality and windows
        return Visibility(plain.layout, False, None), _hidden(mask)
    found = getattr(mask, _ATTRIBUTE, None)
    if not isinstance(found, Visibility):
        raise ModelError(
            "the attention mask was copied on its way through the model, and what it stands for got lost",
            hint="a model on several devices copies it: rerun with `--attention sdpa`",
        )
    return (found if plain.window is None else found._replace(window=plain.window)), None


def _of_boundaries(queries: Tensor, keys: Tensor, query_length: int, key_length: int) -> Layout:
    found = getattr(queries, _ATTRIBUTE, None)
    if not isinstance(found, Layout):
        found = Layout.bounded(queries.tolist(), keys.tolist(), query_length, key_length)
        setattr(queries, _ATTRIBUTE, found)
    return found


def _hidden(mask: Tensor) -> Tensor:
    """A mask (B, 1, Lq, Lk), bool or to be added, as what is added; the model's lowest number means hidden."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)


def _refuse_dropout(dropout: float) -> None:
    if dropout:
        raise ModelError(
            f"attention dropout of {dropout:g} is not supported by our backends",
            hint="set it to 0 in the model's configuration; RLHF trains without dropout",
        )


def _check(layout: Layout, query: Tensor, key: Tensor) -> None:
    expected = (query.shape[0], query.shape[2], key.shape[2])
    if (found := (layout.batch, layout.query_length, layout.key_length)) != expected:
        raise ModelError(
            f"the attention layout is for (batch, queries, keys) {found}, but the model asks for {expected}",
            hint="a layout of packed rows or prefix trees serves a forward pass without a cache",
        )
