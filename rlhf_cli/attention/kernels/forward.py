"""FlashAttention's forward pass in Triton, over every layout.

Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 1: one program for a block of queries of one head
           walks over the keys its segment and that one's ancestors hold, whole blocks without a mask.
Layout:    (B, H, Lq, D), (B, G, Lk, D), (B, G, Lk, Dv), any strides but 1 in the last dimension; output (B, H, Lq, Dv)
           laid out as (B, Lq, H, Dv); log-sum-exp (B, H, Lq).
Precision: inputs float16, bfloat16 or float32, accumulation float32, output as the input.
Saved:     output and log-sum-exp of every row.
Oracle:    attention/backends/reference.py; error at most twice torch's at the same dtype.
Tested on: Triton 3.7.1's interpreter (values) and its compiler for sm_80, sm_89 and sm_90 (tensor cores; spills at head
           sizes 64 and 128: none on sm_90, 8 registers at most on the others); no GPU has run it.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton compiles what stands below: its literals are not Python's, and a call of one of its functions returns.
import triton
import triton.language as tl

from rlhf_cli.attention.kernels.device import (
    LN_2,
    LOG2_E,
    bias_tile,
    chain_run,
    dot,
    key_run,
    load_tile,
    query_run,
    row_base,
    sees,
    store_tile,
    tanh,
    visible_keys,
)


@triton.jit
def _attend(
    acc,
    total,
    peak,
    q,
    key,
    value,
    bias,
    first,
    last,
    query_rows,
    query_length,
    query_at,
    key_length,
    key_at,
    key_l,
    value_l,
    bias_q,
    bias_k,
    score_scale,
    cap,
    window,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    FOLD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the keys `first` to `last` of one run; (acc, total, peak) is its state."""
    for start in range(first, last, KEYS):
        k = load_tile(key, start, key_length, key_l, HEAD_SIZE, KEYS, HEAD_BLOCK, MASKED)
        scores = dot(q, tl.trans(k))
        keys = start + tl.arange(0, KEYS)
        if SOFTCAP:
            scores = cap * tanh(scores * score_scale)
        elif not FOLD:
            scores = scores * score_scale
        if BIAS:
            is_inside = (query_rows < query_length)[:, None] & (keys < key_length)[None, :]
            scores += bias_tile(bias, query_rows[:, None], keys[None, :], is_inside, bias_q, bias_k)
        if MASKED:
            seen = sees(query_at[:, None], key_at + keys[None, :], window, CAUSAL, WINDOW)
            scores = tl.where(seen & (keys < key_length)[None, :], scores, float("-inf"))
        highest = tl.max(scores, 1)
        if FOLD:  # the product with the scale and the difference become one instruction
            highest = highest * score_scale
            scores = scores * score_scale
        new_peak = tl.maximum(peak, highest)
        origin = new_peak
        if MASKED or BIAS:  # a row that saw nothing yet has no peak, and -inf - -inf is NaN
            origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - origin[:, None])
        decay = tl.exp2(peak - origin)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        v = load_tile(value, start, key_length, value_l, VALUE_SIZE, KEYS, VALUE_BLOCK, MASKED)
        acc += dot(weights.to(v.dtype), v)
        peak = new_peak
    return acc, total, peak


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    bias,
    sinks,
    output,
    logsumexp,
    tiles,
    segments,
    chains,
    query_b,
    query_h,
    query_l,
    key_b,
    key_h,
    key_l,
    value_b,
    value_h,
    value_l,
    bias_b,
    bias_h,
    bias_q,
    bias_k,
    output_b,
    output_h,
    output_l,
    heads,
    rows,
    score_scale,
    cap,
    window,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    SINKS: tl.constexpr,
    FOLD: tl.constexpr,
    TREE: tl.constexpr,
):
    """Output and log-sum-exp of one block of queries of one head. Grid: (tiles * heads,), longest tile first."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    number = tl.load(tiles + 2 * tile)
    first_row = tl.load(tiles + 2 * tile + 1)
    batch, row, length, position = query_run(segments, number)
    query_base = row_base(query, batch, head, row, query_b, query_h, query_l)
    q = load_tile(query_base, first_row, length, query_l, HEAD_SIZE, QUERIES, HEAD_BLOCK, True)
    query_rows = first_row + tl.arange(0, QUERIES)
    query_at = position + query_rows
    last_at = position + tl.minimum(first_row + QUERIES, length) - 1

    acc = tl.zeros((QUERIES, VALUE_BLOCK), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    chain_start = 0
    chain_end = 1
    if TREE:
        chain_start, chain_end = chain_run(segments, number)
    for link in range(chain_start, chain_end):
        run = number
        if TREE:
            run = tl.load(chains + link)
        key_batch, key_row, key_length, key_at = key_run(segments, run)
        key_base = row_base(key, key_batch, head // GROUP, key_row, key_b, key_h, key_l)
        value_base = row_base(value, key_batch, head // GROUP, key_row, value_b, value_h, value_l)
        bias_base = bias
        if BIAS:
            bias_base = row_base(bias, batch, head, row, bias_b, bias_h, bias_q) + tl.cast(key_row, tl.int64) * bias_k
        start, whole_start, whole_end, end = visible_keys(
            position + first_row, last_at, key_at, key_length, window, CAUSAL, WINDOW, KEYS
        )
        # fmt: off
        if WINDOW:
            acc, total, peak = _attend(
                acc, total, peak, q, key_base, value_base, bias_base, start, whole_start,
                query_rows, length, query_at, key_length, key_at, key_l, value_l, bias_q, bias_k,
                score_scale, cap, window, HEAD_SIZE, VALUE_SIZE, HEAD_BLOCK, VALUE_BLOCK, KEYS,
                CAUSAL, WINDOW, SOFTCAP, BIAS, FOLD, True)
        acc, total, peak = _attend(
            acc, total, peak, q, key_base, value_base, bias_base, whole_start, whole_end,
            query_rows, length, query_at, key_length, key_at, key_l, value_l, bias_q, bias_k,
            score_scale, cap, window, HEAD_SIZE, VALUE_SIZE, HEAD_BLOCK, VALUE_BLOCK, KEYS,
            CAUSAL, WINDOW, SOFTCAP, BIAS, FOLD, False)
        acc, total, peak = _attend(
            acc, total, peak, q, key_base, value_base, bias_base, whole_end, end,
            query_rows, length, query_at, key_length, key_at, key_l, value_l, bias_q, bias_k,
            score_scale, cap, window, HEAD_SIZE, VALUE_SIZE, HEAD_BLOCK, VALUE_BLOCK, KEYS,
            CAUSAL, WINDOW, SOFTCAP, BIAS, FOLD, True)
        # fmt: on

    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        new_peak = tl.maximum(peak, sink)
        origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay = tl.exp2(peak - origin)
        total = total * decay + tl.exp2(sink - origin)
        acc = acc * decay[:, None]
        peak = new_peak
    sees_any = total > 0.0
    divisor = tl.where(sees_any, total, 1.0)
    output_base = row_base(output, batch, head, row, output_b, output_h, output_l)
    store_tile(output_base, acc / divisor[:, None], first_row, length, output_l, VALUE_SIZE, QUERIES, VALUE_BLOCK)
    lse = tl.where(sees_any, (peak + tl.log2(divisor)) * LN_2, float("-inf"))
    lse_base = logsumexp + (tl.cast(batch, tl.int64) * heads + head) * rows + row
    tl.store(lse_base + query_rows, lse, mask=query_rows < length)
