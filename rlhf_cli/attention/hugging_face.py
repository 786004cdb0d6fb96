"""Our backends inside Hugging Face models.

A model that supports transformers' `AttentionInterface` calls our function in every layer. The layout comes from the
first of these sources that is present:

1. `attention_layout`, passed by the caller of the model (packed rows and prefix trees; in decoding a `SlotCache`);
2. `cu_seq_lens_q` and `cu_seq_lens_k`, the sequence boundaries of TRL's packing;
3. the mask made by our mask function from a padding mask, a cache, or position ids that restart;
4. the shapes of queries and keys.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from rlhf_cli.attention import registry
from rlhf_cli.attention.layout import Layout
from rlhf_cli.attention.masks import MaskFunction, Visibility, padded_layout
from rlhf_cli.attention.slot_cache import SlotCache
from rlhf_cli.errors import ModelError

# transformers treats names containing "flash", "sdpa" or "flex" as its own, and names with a slash as hub kernels.
_PREFIX = "rlhf_"

_backends: dict[str, str] = {}
"""Name of the backend of each value for `attn_implementation`."""

_mask_only_windows: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Window or chunk size of attention modules that define it in their mask and do not pass it to the attention function.

Known from the first pass with a mask, which the check of every loaded model makes."""

_hooks: list[Callable[[nn.Module, dict[str, Any]], None]] = []


def implementation(name: str) -> str:
    """Register a backend with transformers.

    Args:
        name: name of a backend, `auto`, or `package.module:function`.

    Returns:
        The value for `attn_implementation`.

    Raises:
        UsageError: the backend is unknown.
    """
    if name != registry.AUTO:
        registry.find(name)
    plain = re.sub("flash|sdpa|flex|paged", "x", re.sub(r"\W", "_", name))
    # Names of two users' functions may differ in punctuation only.
    registered = _PREFIX + plain + (f"_{hashlib.sha256(name.encode()).hexdigest()[:8]}" if ":" in name else "")

    def attend(module: nn.Module, *tensors: Any, **arguments: Any) -> tuple[Tensor, None]:
        return attention_forward(module, *tensors, backend=name, **arguments)  # pyright: ignore[reportCallIssue]

    _backends[registered] = name
    AttentionInterface.register(registered, attend)
    AttentionMaskInterface.register(registered, attention_mask)  # pyright: ignore[reportArgumentType]
    return registered


def backend_of(implementation: str) -> str:
    """Return the backend that `implementation` registered under this name."""
    return _backends[implementation]


def is_ours(model: nn.Module) -> bool:
    """Return whether a Hugging Face model uses one of our backends."""
    return str(getattr(model.config, "_attn_implementation", "")).startswith(_PREFIX)


def is_built_in(model: nn.Module) -> bool:
    """Return whether a Hugging Face model uses one of our backends, and not a user's function."""
    used = str(getattr(model.config, "_attn_implementation", ""))
    return used in {_PREFIX + name for name in (registry.AUTO, *registry.built_in())}


def has_mask_only_windows(model: nn.Module) -> bool:
    """Return whether a window or chunk of a loaded model is in its mask alone, so that its passes need one."""
    return bool(_mask_only_windows) and any(module in _mask_only_windows for module in model.modules())


@contextmanager
def attention_hook(hook: Callable[[nn.Module, dict[str, Any]], None]) -> Iterator[None]:
    """Inside the context, call `hook` with the module and the arguments of every attention call."""
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.remove(hook)


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
    attention_layout: Layout | SlotCache | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention for one layer; transformers calls this.

    Args:
        module: the model's attention module.
        query: (B, H, Lq, D).
        key: (B, G, Lk, D), including the cache.
        value: (B, G, Lk, Dv).
        attention_mask: the result of `attention_mask` below, a mask (B, 1, Lq, Lk) made by the caller, or None.
        backend: name of our backend.
        scaling, sliding_window, softcap: `scale`, `window` and `softcap` of `contract`.
        dropout: must be 0.
        is_causal: overrides the attribute of the module.
        s_aux: (H,) sinks.
        position_bias: added to the scores, broadcastable to (B, H, Lq, Lk) (T5).
        attention_layout: passed by the caller of the model; in decoding a `SlotCache`, which computes attention itself,
            whatever the backend.
        cu_seq_lens_q, cu_seq_lens_k: (S + 1,) boundaries of packed sequences, B = 1.

    Returns:
        Output (B, Lq, H, Dv), and None instead of the weights.

    Raises:
        ModelError: dropout is not 0, the layout or mask does not fit the shapes, or a sequence of a layout is longer
            than a window that the model defines in its mask alone.
    """
    _refuse_dropout(dropout)
    if attention_layout is not None:
        _check_window(module, sliding_window, attention_layout)
    if isinstance(attention_layout, SlotCache):
        rules = {"scale": scaling, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
        return attention_layout.attend(query, key, value, **rules), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bias = position_bias
    if attention_layout is not None:
        visibility = Visibility(attention_layout, causal, sliding_window)
    elif cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        layout = _from_boundaries(cu_seq_lens_q, cu_seq_lens_k, query.shape[2], key.shape[2])
        _check_window(module, sliding_window, layout)
        visibility = Visibility(layout, causal, sliding_window)
    else:
        layout = Layout.dense(query.shape[0], query.shape[2], key.shape[2])
        visibility, mask_bias = _from_mask(attention_mask, Visibility(layout, causal, sliding_window))
        local_size = getattr(getattr(attention_mask, _ATTRIBUTE, None), "local_size", None)
        if sliding_window is None and local_size is not None:
            _mask_only_windows[module] = local_size
        if mask_bias is not None:
            bias = mask_bias.to(query.dtype) if bias is None else bias + mask_bias.to(bias.dtype)
    _check_shapes(visibility.layout, query, key)
    arguments: dict[str, Any] = {
        "scale": scaling,
        "causal": visibility.causal,
        "window": visibility.window,
        "softcap": softcap,
        "sinks": s_aux,
        "bias": bias,
    }
    for hook in _hooks:
        hook(module, {"query": query, "key": key, "value": value, "layout": visibility.layout, **arguments})
    output = registry.attention(query, key, value, visibility.layout, backend=backend, **arguments).output
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
    """Make the mask of a forward pass; transformers calls this once per pass and hands the result to every layer.

    The mask is (B, Lk), True on real keys, and carries a `_LazyVisibility` as an attribute. Its layout is made when a
    layer asks for it: on a GPU that waits for the device, for nothing where the caller of the model passes a layout.

    Args:
        batch_size: B.
        q_length: Lq.
        kv_length: Lk, including slots of a static cache that are still empty.
        q_offset: tokens before the first query.
        kv_offset: tokens before the first key, dropped by a sliding-window cache.
        mask_function: f(b, head, i, j), True where query i of batch row b sees key j.
        attention_mask: (B, tokens so far), True on real tokens.
        device: of the mask.
        local_size: window or chunk size of `mask_function`.
        use_vmap: the model has added its own function to `mask_function`.

    Raises:
        ModelError: the mask is not a layout.
    """
    if attention_mask is not None and hasattr(attention_mask, _ATTRIBUTE):
        return attention_mask  # `generate` has already made it, for a static cache
    if use_vmap:
        raise ModelError("the model adds its own mask, which attention layouts cannot express")
    # A static cache counts its tokens in place, before the first layer asks for the layout.
    before = q_offset.clone() if isinstance(q_offset, Tensor) else q_offset
    columns = torch.arange(kv_offset, kv_offset + kv_length, device=device)
    is_cross = mask_function is bidirectional_mask_function  # or an encoder: outputs at padding are never used
    is_written = torch.ones_like(columns, dtype=torch.bool) if is_cross else columns < q_offset + q_length
    is_real = is_written.expand(batch_size, -1)
    if attention_mask is not None:
        is_real_token = attention_mask.to(device=device, dtype=torch.bool)
        length = is_real_token.shape[1]
        is_real = is_real & (columns < length) & is_real_token[:, columns.clamp(max=length - 1)]
    mask = is_real.contiguous()
    plain = mask.detach()  # another object: what the mask carries must not refer to the mask

    def visibility() -> Visibility:
        is_real, offset = plain.cpu(), int(before)
        if is_cross:
            return Visibility(Layout.cross(q_length, is_real), False, None)
        if mask_function is causal_mask_function:
            return Visibility(padded_layout(is_real, q_length, offset - kv_offset), True, None)
        function = MaskFunction(mask_function, batch_size, offset, q_length, kv_offset, kv_length, local_size)
        return function.visibility(is_real)

    setattr(mask, _ATTRIBUTE, _LazyVisibility(visibility, local_size))
    return mask


class _LazyVisibility:
    """The visibility of a mask, made once, when the first layer needs it.

    Args:
        make: makes it.
        local_size: window or chunk size of the mask.

    Attributes:
        value: the visibility.
    """

    def __init__(self, make: Callable[[], Visibility], local_size: int | None) -> None:
        self._make = make
        self.local_size = local_size

    @cached_property
    def value(self) -> Visibility:
        return self._make()


_ATTRIBUTE = "rlhf_visibility"


def _from_mask(mask: Tensor | None, default: Visibility) -> tuple[Visibility, Tensor | None]:
    """Split a mask into its visibility and a bias to add to the scores.

    Args:
        mask: ours, (B, Lk); a caller's, (B, 1, Lq, Lk); or None.
        default: from the shapes and the arguments of the module.
    """
    if mask is None:
        return default, None
    if mask.dim() == 4:  # it already includes causality and windows
        return Visibility(default.layout, False, None), _mask_bias(mask)
    lazy = getattr(mask, _ATTRIBUTE, None)
    if not isinstance(lazy, _LazyVisibility):
        raise ModelError(
            "the model copied its attention mask, which lost the layout attached to it",
            hint="models spread over several devices copy masks; rerun with `--attention sdpa`",
        )
    found = lazy.value
    return (found if default.window is None else found._replace(window=default.window)), None


def _from_boundaries(queries: Tensor, keys: Tensor, query_length: int, key_length: int) -> Layout:
    found = getattr(queries, _ATTRIBUTE, None)
    if not isinstance(found, Layout):
        found = Layout.bounded(queries.tolist(), keys.tolist(), query_length, key_length)
        setattr(queries, _ATTRIBUTE, found)
    return found


def _mask_bias(mask: Tensor) -> Tensor:
    """Convert a mask (B, 1, Lq, Lk), bool or additive, to a bias; the lowest number of its dtype becomes -inf."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)


def _refuse_dropout(dropout: float) -> None:
    if dropout:
        raise ModelError(
            f"attention dropout of {dropout:g} is not supported by our backends",
            hint="set attention dropout to 0 in the model's config.json",
        )


def _check_window(module: nn.Module, window: int | None, layout: Layout | SlotCache) -> None:
    """Refuse sequences without a mask that are longer than a window that only the mask defines."""
    size = _mask_only_windows.get(module) if window is None else None
    if size is not None and layout.longest > size:
        raise ModelError(
            f"a sequence of {layout.longest} tokens is longer than the window or chunk of {size} that this model "
            "defines in its mask alone, which packed and grouped sequences do not have",
            hint="rerun with `--attention sdpa`; batches are then padded",
        )


def _check_shapes(layout: Layout, query: Tensor, key: Tensor) -> None:
    expected = (query.shape[0], query.shape[2], key.shape[2])
    if (found := (layout.batch, layout.query_length, layout.key_length)) != expected:
        raise ModelError(
            f"the attention layout has (batch, queries, keys) {found}, but the model expects {expected}",
            hint="packed rows and prefix trees require a forward pass without a cache",
        )
