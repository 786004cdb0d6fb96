"""FlashAttention's backward pass in Triton, over every layout: delta, dK/dV, dQ and dBias.

Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 2, in two kernels instead of atomic additions, so
           that the same input gives the same bits: one program for a block of keys walks over the queries that see it,
           in all heads of its group and all segments of its subtree; one for a block of queries walks over its keys.
           With P = exp(S - L) and delta = rowsum(dO * O) - dL:  dV = P^T dO,  dP = dO V^T,  dS = P * (dP - delta),
           dQ = scale dS K,  dK = scale dS^T Q,  and under a softcap dS (1 - tanh^2) in place of dS.
Layout:    as in the forward pass; gradients as the tensors they belong to, delta (B, H, Lq), dBias (B, H, Lq, Lk).
Precision: inputs float16, bfloat16 or float32, accumulation float32, dBias float32.
Saved:     nothing; scores are computed again from the log-sum-exp.
Oracle:    attention/backends/reference.py; error at most three times torch's at the same dtype.
Tested on: Triton 3.7.1's interpreter (values) and its compiler for sm_80, sm_89 and sm_90 (tensor cores; spills at head
           sizes 64 and 128: none on sm_90, 8 registers at most on the others); no GPU has run it.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton compiles what stands below: its literals are not Python's, and a call of one of its functions returns.
import triton
import triton.language as tl

from rlhf_cli.attention.kernels.device import (
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
    subtree_end,
    tanh,
    visible_keys,
    visible_queries,
)


@triton.jit
def row_sums_kernel(
    output,
    d_output,
    logsumexp,
    d_logsumexp,
    origin,
    delta,
    tiles,
    segments,
    output_b,
    output_h,
    output_l,
    d_output_b,
    d_output_h,
    d_output_l,
    d_logsumexp_b,
    d_logsumexp_h,
    d_logsumexp_l,
    heads,
    rows,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    D_LOGSUMEXP: tl.constexpr,
):
    """Of one block of queries of one head what a score is measured from, and delta. Grid: (tiles * heads,).

    The first is the log-sum-exp in units of log2, but +inf, so that weights are 0, on rows that see nothing.
    """
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    number = tl.load(tiles + 2 * tile)
    first_row = tl.load(tiles + 2 * tile + 1)
    batch, row, length, _ = query_run(segments, number)
    output_base = row_base(output, batch, head, row, output_b, output_h, output_l)
    d_output_base = row_base(d_output, batch, head, row, d_output_b, d_output_h, d_output_l)
    o = load_tile(output_base, first_row, length, output_l, VALUE_SIZE, QUERIES, VALUE_BLOCK, True)
    d_o = load_tile(d_output_base, first_row, length, d_output_l, VALUE_SIZE, QUERIES, VALUE_BLOCK, True)
    found = tl.sum(o.to(tl.float32) * d_o.to(tl.float32), 1)
    query_rows = first_row + tl.arange(0, QUERIES)
    is_real = query_rows < length
    if D_LOGSUMEXP:
        d_lse_base = row_base(d_logsumexp, batch, head, row, d_logsumexp_b, d_logsumexp_h, d_logsumexp_l)
        d_lse_rows = tl.cast(query_rows, tl.int64) * d_logsumexp_l
        found -= tl.load(d_lse_base + d_lse_rows, mask=is_real, other=0.0).to(tl.float32)
    row_start = (tl.cast(batch, tl.int64) * heads + head) * rows + row
    lse = tl.load(logsumexp + row_start + query_rows, mask=is_real, other=0.0)
    sees_none = lse == float("-inf")
    tl.store(origin + row_start + query_rows, tl.where(sees_none, float("inf"), lse * LOG2_E), mask=is_real)
    tl.store(delta + row_start + query_rows, tl.where(sees_none, 0.0, found), mask=is_real)


@triton.jit
def _gather_keys(
    d_q,
    q,
    d_o,
    lse,
    delta,
    key,
    value,
    bias,
    d_bias,
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
    d_bias_q,
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
    D_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What the keys `first` to `last` of one run add to dQ / scale."""
    for start in range(first, last, KEYS):
        k = load_tile(key, start, key_length, key_l, HEAD_SIZE, KEYS, HEAD_BLOCK, MASKED)
        v = load_tile(value, start, key_length, value_l, VALUE_SIZE, KEYS, VALUE_BLOCK, MASKED)
        keys = start + tl.arange(0, KEYS)
        is_inside = (query_rows < query_length)[:, None] & (keys < key_length)[None, :]
        scores = dot(q, tl.trans(k)) * score_scale
        slope = 1.0
        if SOFTCAP:
            bent = tanh(scores)
            slope = 1.0 - bent * bent
            scores = cap * bent
        if BIAS:
            scores += bias_tile(bias, query_rows[:, None], keys[None, :], is_inside, bias_q, bias_k)
        weights = tl.exp2(scores - lse[:, None])
        if MASKED:
            seen = sees(query_at[:, None], key_at + keys[None, :], window, CAUSAL, WINDOW)
            weights = tl.where(seen & (keys < key_length)[None, :], weights, 0.0)
        d_scores = weights * (dot(d_o, tl.trans(v)) - delta[:, None])
        if D_BIAS:
            pointers = d_bias + tl.cast(query_rows, tl.int64)[:, None] * d_bias_q + keys[None, :]
            tl.store(pointers, d_scores, mask=is_inside)
        if SOFTCAP:
            d_scores = d_scores * slope
        d_q += dot(d_scores.to(k.dtype), k)
    return d_q


@triton.jit
def dq_kernel(
    query,
    key,
    value,
    bias,
    d_output,
    origin,
    delta,
    d_query,
    d_bias,
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
    d_output_b,
    d_output_h,
    d_output_l,
    d_query_b,
    d_query_h,
    d_query_l,
    d_bias_b,
    d_bias_h,
    d_bias_q,
    heads,
    rows,
    scale,
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
    D_BIAS: tl.constexpr,
    TREE: tl.constexpr,
):
    """dQ of one block of queries of one head, and dS for dBias. Grid: (tiles * heads,), longest tile first."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    number = tl.load(tiles + 2 * tile)
    first_row = tl.load(tiles + 2 * tile + 1)
    batch, row, length, position = query_run(segments, number)
    query_base = row_base(query, batch, head, row, query_b, query_h, query_l)
    d_output_base = row_base(d_output, batch, head, row, d_output_b, d_output_h, d_output_l)
    q = load_tile(query_base, first_row, length, query_l, HEAD_SIZE, QUERIES, HEAD_BLOCK, True)
    d_o = load_tile(d_output_base, first_row, length, d_output_l, VALUE_SIZE, QUERIES, VALUE_BLOCK, True)
    row_start = (tl.cast(batch, tl.int64) * heads + head) * rows + row
    query_rows = first_row + tl.arange(0, QUERIES)
    lse = tl.load(origin + row_start + query_rows, mask=query_rows < length, other=0.0)
    d_row = tl.load(delta + row_start + query_rows, mask=query_rows < length, other=0.0)
    query_at = position + query_rows
    last_at = position + tl.minimum(first_row + QUERIES, length) - 1

    d_q = tl.zeros((QUERIES, HEAD_BLOCK), tl.float32)
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
        d_bias_base = d_bias
        if BIAS:
            bias_base = row_base(bias, batch, head, row, bias_b, bias_h, bias_q) + tl.cast(key_row, tl.int64) * bias_k
        if D_BIAS:
            d_bias_base = row_base(d_bias, batch, head, row, d_bias_b, d_bias_h, d_bias_q) + key_row
        start, whole_start, whole_end, end = visible_keys(
            position + first_row, last_at, key_at, key_length, window, CAUSAL, WINDOW, KEYS
        )
        # fmt: off
        if WINDOW:
            d_q = _gather_keys(
                d_q, q, d_o, lse, d_row, key_base, value_base, bias_base, d_bias_base, start, whole_start,
                query_rows, length, query_at, key_length, key_at, key_l, value_l, bias_q, bias_k, d_bias_q,
                score_scale, cap, window, HEAD_SIZE, VALUE_SIZE, HEAD_BLOCK, VALUE_BLOCK, KEYS,
                CAUSAL, WINDOW, SOFTCAP, BIAS, D_BIAS, True)
        d_q = _gather_keys(
            d_q, q, d_o, lse, d_row, key_base, value_base, bias_base, d_bias_base, whole_start, whole_end,
            query_rows, length, query_at, key_length, key_at, key_l, value_l, bias_q, bias_k, d_bias_q,
            score_scale, cap, window, HEAD_SIZE, VALUE_SIZE, HEAD_BLOCK, VALUE_BLOCK, KEYS,
            CAUSAL, WINDOW, SOFTCAP, BIAS, D_BIAS, False)
        d_q = _gather_keys(
            d_q, q, d_o, lse, d_row, key_base, value_base, bias_base, d_bias_base, whole_end, end,
            query_rows, length, query_at, key_length, key_at, key_l, value_l, bias_q, bias_k, d_bias_q,
            score_scale, cap, window, HEAD_SIZE, VALUE_SIZE, HEAD_BLOCK, VALUE_BLOCK, KEYS,
            CAUSAL, WINDOW, SOFTCAP, BIAS, D_BIAS, True)
        # fmt: on
    d_query_base = row_base(d_query, batch, head, row, d_query_b, d_query_h, d_query_l)
    store_tile(d_query_base, d_q * scale, first_row, length, d_query_l, HEAD_SIZE, QUERIES, HEAD_BLOCK)


@triton.jit
def _gather_queries(
    d_k,
    d_v,
    k,
    v,
    query,
    d_output,
    origin,
    delta,
    bias,
    first,
    last,
    key_rows,
    key_length,
    key_at,
    query_length,
    query_at,
    query_l,
    d_output_l,
    bias_q,
    bias_k,
    score_scale,
    cap,
    window,
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
    MASKED: tl.constexpr,
):
    """What the queries `first` to `last` of one run and head add to dK / scale and dV; scores are keys by queries.

    Rows behind an end need no mask: such queries add 0, their dO and delta being loaded as 0, and such keys are rows
    of dK and dV that nobody stores.
    """
    for start in range(first, last, QUERIES):
        # With 64 bits, unlike elsewhere, since in 32 more registers spill here.
        row, left = tl.cast(start, tl.int64), query_length - start
        q = load_tile(query + row * query_l, 0, left, query_l, HEAD_SIZE, QUERIES, HEAD_BLOCK, True)
        d_o = load_tile(d_output + row * d_output_l, 0, left, d_output_l, VALUE_SIZE, QUERIES, VALUE_BLOCK, True)
        queries = start + tl.arange(0, QUERIES)
        lse = tl.load(origin + queries, mask=queries < query_length, other=0.0)
        d_row = tl.load(delta + queries, mask=queries < query_length, other=0.0)
        scores = dot(k, tl.trans(q)) * score_scale
        slope = 1.0
        if SOFTCAP:
            bent = tanh(scores)
            slope = 1.0 - bent * bent
            scores = cap * bent
        if BIAS:
            is_inside = (key_rows < key_length)[:, None] & (queries < query_length)[None, :]
            scores += bias_tile(bias, queries[None, :], key_rows[:, None], is_inside, bias_q, bias_k)
        weights = tl.exp2(scores - lse[None, :])
        if MASKED:
            seen = sees(query_at + queries[None, :], key_at[:, None], window, CAUSAL, WINDOW)
            weights = tl.where(seen, weights, 0.0)
        d_v += dot(weights.to(d_o.dtype), d_o)
        # Starting the sum at -delta costs no registers, taking it off afterwards does.
        d_scores = weights * dot(v, tl.trans(d_o), tl.zeros((KEYS, QUERIES), tl.float32) - d_row[None, :])
        if SOFTCAP:
            d_scores = d_scores * slope
        d_k += dot(d_scores.to(q.dtype), q)
    return d_k, d_v


@triton.jit
def dkdv_kernel(
    query,
    key,
    value,
    bias,
    d_output,
    origin,
    delta,
    d_key,
    d_value,
    tiles,
    segments,
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
    d_output_b,
    d_output_h,
    d_output_l,
    d_key_b,
    d_key_h,
    d_key_l,
    d_value_b,
    d_value_h,
    d_value_l,
    heads,
    rows,
    scale,
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
):
    """dK and dV of one block of keys of one key head. Grid: (tiles * heads / GROUP,), longest tile first."""
    key_heads = heads // GROUP
    key_head = tl.program_id(0) % key_heads
    tile = tl.program_id(0) // key_heads
    number = tl.load(tiles + 2 * tile)
    first_row = tl.load(tiles + 2 * tile + 1)
    batch, row, length, position = key_run(segments, number)
    key_base = row_base(key, batch, key_head, row, key_b, key_h, key_l)
    value_base = row_base(value, batch, key_head, row, value_b, value_h, value_l)
    k = load_tile(key_base, first_row, length, key_l, HEAD_SIZE, KEYS, HEAD_BLOCK, True)
    v = load_tile(value_base, first_row, length, value_l, VALUE_SIZE, KEYS, VALUE_BLOCK, True)
    key_rows = first_row + tl.arange(0, KEYS)
    key_at = position + key_rows
    last_at = position + tl.minimum(first_row + KEYS, length) - 1

    d_k = tl.zeros((KEYS, HEAD_BLOCK), tl.float32)
    d_v = tl.zeros((KEYS, VALUE_BLOCK), tl.float32)
    # Both loops count from 0: counted from `number` and `key_head * GROUP`, nine registers spill at head size 128.
    runs = subtree_end(segments, number) - number
    for step in range(0, runs):
        run = number + step
        query_batch, query_row, query_length, query_at = query_run(segments, run)
        start, whole_start, whole_end, end = visible_queries(
            position + first_row, last_at, query_at, query_length, window, CAUSAL, WINDOW, QUERIES
        )
        for member in range(0, GROUP):
            head = key_head * GROUP + member
            query_base = row_base(query, query_batch, head, query_row, query_b, query_h, query_l)
            d_output_base = row_base(d_output, query_batch, head, query_row, d_output_b, d_output_h, d_output_l)
            row_start = (tl.cast(query_batch, tl.int64) * heads + head) * rows + query_row
            bias_base = bias
            if BIAS:
                bias_base = row_base(bias, query_batch, head, query_row, bias_b, bias_h, bias_q)
                bias_base += tl.cast(row, tl.int64) * bias_k
            # fmt: off
            if CAUSAL or WINDOW:
                d_k, d_v = _gather_queries(
                    d_k, d_v, k, v, query_base, d_output_base, origin + row_start, delta + row_start, bias_base,
                    start, whole_start, key_rows, length, key_at, query_length, query_at, query_l, d_output_l,
                    bias_q, bias_k, score_scale, cap, window, HEAD_SIZE, VALUE_SIZE, HEAD_BLOCK, VALUE_BLOCK,
                    QUERIES, KEYS, CAUSAL, WINDOW, SOFTCAP, BIAS, True)
            d_k, d_v = _gather_queries(
                d_k, d_v, k, v, query_base, d_output_base, origin + row_start, delta + row_start, bias_base,
                whole_start, whole_end, key_rows, length, key_at, query_length, query_at, query_l, d_output_l,
                bias_q, bias_k, score_scale, cap, window, HEAD_SIZE, VALUE_SIZE, HEAD_BLOCK, VALUE_BLOCK,
                QUERIES, KEYS, CAUSAL, WINDOW, SOFTCAP, BIAS, False)
            if WINDOW:
                d_k, d_v = _gather_queries(
                    d_k, d_v, k, v, query_base, d_output_base, origin + row_start, delta + row_start, bias_base,
                    whole_end, end, key_rows, length, key_at, query_length, query_at, query_l, d_output_l,
                    bias_q, bias_k, score_scale, cap, window, HEAD_SIZE, VALUE_SIZE, HEAD_BLOCK, VALUE_BLOCK,
                    QUERIES, KEYS, CAUSAL, WINDOW, SOFTCAP, BIAS, True)
            # fmt: on
    d_key_base = row_base(d_key, batch, key_head, row, d_key_b, d_key_h, d_key_l)
    d_value_base = row_base(d_value, batch, key_head, row, d_value_b, d_value_h, d_value_l)
    store_tile(d_key_base, d_k * scale, first_row, length, d_key_l, HEAD_SIZE, KEYS, HEAD_BLOCK)
    store_tile(d_value_base, d_v, first_row, length, d_value_l, VALUE_SIZE, KEYS, VALUE_BLOCK)
