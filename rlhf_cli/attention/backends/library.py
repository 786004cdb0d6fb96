"""The `torch` backend: `scaled_dot_product_attention`, called in the fastest correct way.

one full sequence per row, or no mask         one call
packed, padded or prefix tree, on the CPU     one call per segment, so hidden scores are never computed; one per
                                              group of segments where they are short
short sequences, windows, biases, CUDA        one call with a mask
half precision on the CPU, short sequences    the equation: torch's CPU kernel is up to five times slower there
soft cap, sinks                               the equation: torch's kernels support neither
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_cli.attention.backends import short_segments
from rlhf_cli.attention.contract import AttentionOutput, Backend, Request
from rlhf_cli.attention.layout import Layout

# Measured on an AVX512-BF16 core, head size 64, forward and backward in bfloat16: torch's CPU kernel takes 2 to 3 times
# as long as the equation at 128 tokens, the same at 256, 0.35 to 1.7 times at 512 to 768. In float32 it always wins.
SHORT_IN_HALF = 256
# Longest sequence in tokens up to which groups of segments are computed together. On a Zen core, forward and backward,
# that takes 0.2 to 0.9 of the time of a call per segment in bfloat16, up to 256 tokens; in float32 0.7 to 0.9 up to 80,
# 1.0 to 1.2 at 200.
GROUPED = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 96}
# Below this mean segment length one masked call is faster than one call per segment.
SHORT_SEGMENT = 48


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> AttentionOutput:
    """Compute attention with torch; see `contract`. Returns no log-sum-exp."""
    if window is not None and window >= layout.longest:
        window = None
    if softcap is not None or sinks is not None:
        return _with_mask(query, key, value, layout, causal, window, bias, _Equation(scale, softcap, sinks))
    is_plain = bias is None and window is None
    # torch's `is_causal` aligns the first query with the first key; ours aligns the last query with the last key.
    if is_plain and layout.is_dense and (not causal or layout.query_length in (1, layout.key_length)):
        return AttentionOutput(_one_call(query, key, value, causal and layout.query_length > 1, scale), None)
    if is_plain and query.device.type == "cpu" and _prefers_loop(layout, causal):
        if layout.longest <= GROUPED.get(query.dtype, 0):
            return AttentionOutput(short_segments.attend(query, key, value, layout, scale=scale, causal=causal), None)
        return AttentionOutput(_by_segment(query, key, value, layout, causal, scale), None)
    return _with_mask(query, key, value, layout, causal, window, bias, _Equation(scale, None, None))


def _prefers_loop(layout: Layout, causal: bool) -> bool:
    if causal and any(
        segment.query_length > offset + segment.key_length
        for segment, offset in zip(layout.segments, layout.offsets, strict=True)
    ):
        return False  # its first queries see no key, which one call per segment does not handle
    return layout.is_tree or layout.real_tokens >= SHORT_SEGMENT * max(1, len(layout.segments))


def _one_call(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
    if _is_short_in_half(query, key):
        mask = _triangle(query.shape[2], key.shape[2], str(query.device)) if causal else None
        return equation(query, key, value, mask, scale, None, None)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention with a mask, bool (True: visible) or additive, broadcastable to (B, H, Lq, Lk)."""
    if _is_short_in_half(query, key):
        return equation(query, key, value, mask, scale, None, None)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _is_short_in_half(query: Tensor, key: Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16) and (
        query.shape[2] <= SHORT_IN_HALF and key.shape[2] <= 2 * SHORT_IN_HALF
    )  # fmt: skip


def _by_segment(query: Tensor, key: Tensor, value: Tensor, layout: Layout, causal: bool, scale: float) -> Tensor:
    """One call per segment, over the keys of its ancestors and its own."""
    queries = _pieces(query, layout, of_queries=True)
    keys, values = (_pieces(tensor, layout, of_queries=False) for tensor in (key, value))
    found: dict[int, Tensor] = {}
    for number, segment in enumerate(layout.segments):
        if segment.query_length == 0:
            continue
        chain = [part for part in (*layout.ancestors[number], number) if layout.segments[part].key_length]
        if not chain:
            continue  # it sees no keys
        k, v = (
            pieces[chain[0]] if len(chain) == 1 else torch.cat([pieces[part] for part in chain], dim=2)
            for pieces in (keys, values)
        )
        q = queries[number]
        if not causal or q.shape[2] == k.shape[2] or q.shape[2] == 1:
            found[number] = _one_call(q, k, v, causal and q.shape[2] > 1, scale)
        else:
            found[number] = _masked(q, k, v, _triangle(q.shape[2], k.shape[2], str(q.device)), scale)
    return _assembled(found, query, value, layout)


def _pieces(tensor: Tensor, layout: Layout, *, of_queries: bool) -> dict[int, Tensor]:
    """Rows of each segment: (1, heads, rows, size). Uses `split`, whose gradient is a single concatenation."""
    found: dict[int, Tensor] = {}
    for row, cuts in enumerate(_cuts(layout, of_queries)):
        for (number, _), piece in zip(cuts, tensor[row : row + 1].split([n for _, n in cuts], dim=2), strict=True):
            if number is not None:
                found[number] = piece
    return found


def _assembled(found: dict[int, Tensor], query: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Put the outputs of the segments in their rows, 0 elsewhere: (B, H, Lq, Dv)."""
    rows = []
    for cuts in _cuts(layout, True):
        pieces = []
        for number, length in cuts:
            if number is not None and number in found:
                pieces.append(found[number].transpose(1, 2))
            else:
                pieces.append(query.new_zeros(1, length, query.shape[1], value.shape[-1]))
        rows.append(torch.cat(pieces, dim=1))
    return torch.cat(rows).transpose(1, 2)


def _cuts(layout: Layout, of_queries: bool) -> Iterator[list[tuple[int | None, int]]]:
    """Per batch row (segment, length) in order; gaps between segments have None as segment."""
    width = layout.query_length if of_queries else layout.key_length
    rows: list[list[tuple[int, int, int]]] = [[] for _ in range(layout.batch)]
    for number, segment in enumerate(layout.segments):
        start, length = (
            (segment.query_start, segment.query_length) if of_queries else (segment.key_start, segment.key_length)
        )
        if length:
            rows[start // width].append((start % width, length, number))
    for parts in rows:
        cuts: list[tuple[int | None, int]] = []
        at = 0
        for start, length, number in sorted(parts):
            if start > at:
                cuts.append((None, start - at))
            cuts.append((number, length))
            at = start + length
        if at < width or not cuts:
            cuts.append((None, width - at))
        yield cuts


@dataclass(frozen=True)
class _Equation:
    """Arguments besides the mask; see `contract`."""

    scale: float
    softcap: float | None
    sinks: Tensor | None


def _with_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
    rules: _Equation,
) -> AttentionOutput:
    """One call over all rows.

    Torch's kernels disagree on rows without visible keys: such a row sees all keys here, and its output is then zeroed.
    """
    visible = layout.visible(causal=causal, window=window, device=query.device).unsqueeze(1)
    if bias is not None:
        visible = visible & ~torch.isneginf(bias)
    sees = visible.any(-1, keepdim=True)
    mask = visible | ~sees
    if bias is not None:
        mask = bias.to(query.dtype).masked_fill(torch.isneginf(bias), 0.0).masked_fill(~mask, -torch.inf)
    # NaN in padding spreads, since 0 x NaN is NaN. Checking the output is cheaper than zeroing the padding of a cache
    # at every call. On CUDA the check would synchronize with the device, so padding is always zeroed.
    output = None if query.is_cuda else _equation_or_kernel(query, key, value, mask, rules)
    if output is None or not bool(torch.isfinite(output).all()):
        query = query.masked_fill(~layout.is_real(query.device)[:, None, :, None], 0.0)
        is_padding = ~layout.is_real_key(key.device)[:, None, :, None]
        key, value = key.masked_fill(is_padding, 0.0), value.masked_fill(is_padding, 0.0)
        output = _equation_or_kernel(query, key, value, mask, rules)
    if query.is_cuda or not bool(sees.all()):  # here too
        output = output.masked_fill(~sees, 0.0)
    return AttentionOutput(output, None)


def _equation_or_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rules: _Equation) -> Tensor:
    if rules.softcap is not None or rules.sinks is not None:
        return equation(query, key, value, mask, rules.scale, rules.softcap, rules.sinks)
    return _masked(query, key, value, mask, rules.scale)


def equation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """softmax(scale Q K^T) V in the precision of the inputs, with the softmax in float32."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = (query * scale) @ key.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    scores = scores.float() if scores.dtype != torch.float64 else scores
    if sinks is None:
        return scores.softmax(-1).to(value.dtype) @ value
    column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    return weights.to(value.dtype) @ value


@lru_cache(maxsize=64)
def _triangle(queries: int, keys: int, device: str) -> Tensor:
    """Causal mask (Lq, Lk), True where visible; the last query is aligned with the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _unsupported(request: Request) -> str | None:
    if request.needs_logsumexp:
        return "scaled_dot_product_attention does not return the log-sum-exp"
    return None


BACKEND = Backend(
    "torch",
    "torch's scaled_dot_product_attention, called in the fastest correct way",
    attend,
    missing=lambda: None,
    unsupported=_unsupported,
)
