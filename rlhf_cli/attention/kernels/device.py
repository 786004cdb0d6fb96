"""What the kernels share: loading a tile, products, scores, and who sees whom.

Scores are kept in units of log2, since a GPU has exp2 and no exp: `score_scale` and `cap` carry the factor log2(e).
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# Triton compiles what stands below: its literals are not Python's.
import triton
import triton.language as tl

from rlhf_cli.attention.kernels.schedule import COLUMNS

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

_WIDTH = tl.constexpr(len(COLUMNS))
_QUERY = tl.constexpr(COLUMNS.index("query_batch"))
_KEY = tl.constexpr(COLUMNS.index("key_batch"))
_CHAIN = tl.constexpr(COLUMNS.index("chain_start"))
_SUBTREE_END = tl.constexpr(COLUMNS.index("subtree_end"))


@triton.jit
def dot(a, b, acc=None):
    """a @ b + acc in float32; float32 inputs are not rounded to TF32."""
    if INTERPRETED:  # numpy would take bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_tile(
    base, first, end, stride, SIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):
    """(ROWS, WIDTH) of a matrix from row `first` on; 0 from column SIZE on, and from row `end` on if MASKED.

    Offsets count in 32 bits, which takes 40 registers fewer; `function` sees to it that they suffice.
    """
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    pointers = base + (rows[:, None] * stride + columns[None, :])
    if MASKED:
        if SIZE == WIDTH:
            return tl.load(pointers, mask=(rows < end)[:, None], other=0.0)
        return tl.load(pointers, mask=(rows < end)[:, None] & (columns < SIZE)[None, :], other=0.0)
    if SIZE == WIDTH:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < SIZE)[None, :], other=0.0)


@triton.jit
def store_tile(base, tile, first, end, stride, SIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The reverse of `load_tile`, rows from `end` on left alone."""
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    pointers = base + (rows[:, None] * stride + columns[None, :])
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(rows < end)[:, None] & (columns < SIZE)[None, :])


@triton.jit
def query_run(segments, number):
    """Batch row, first row in it, length and first position of a segment's queries."""
    at = segments + number * _WIDTH + _QUERY
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def key_run(segments, number):
    """Batch row, first row in it, length and first position of a segment's keys."""
    at = segments + number * _WIDTH + _KEY
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def chain_run(segments, number):
    """Start and end in `chains` of a segment's ancestors and itself."""
    at = segments + number * _WIDTH + _CHAIN
    return tl.load(at), tl.load(at + 1)


@triton.jit
def subtree_end(segments, number):
    """The segment number behind a segment's last descendant."""
    return tl.load(segments + number * _WIDTH + _SUBTREE_END)


@triton.jit
def row_base(pointer, batch, head, row, stride_b, stride_h, stride_l):
    """Pointer to a row of a (B, H, L, D) tensor."""
    return (
        pointer
        + tl.cast(batch, tl.int64) * stride_b
        + tl.cast(head, tl.int64) * stride_h
        + tl.cast(row, tl.int64) * stride_l
    )


@triton.jit
def visible_keys(
    first_query, last_query, key_at, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr
):
    """Which of `length` keys, the first at position `key_at`, the queries at these positions see.

    Returns:
        Where blocks start that any of the queries sees, where those start and end that all of them see in whole, and
        where the first kind ends; all but the last are multiples of BLOCK.
    """
    start = 0
    end = length
    whole_start = 0
    whole_end = length
    if CAUSAL:
        end = tl.minimum(end, last_query + 1 - key_at)
        whole_end = tl.minimum(whole_end, first_query + 1 - key_at)
    if WINDOW:
        start = tl.maximum(0, first_query - window + 1 - key_at)
        whole_start = tl.maximum(0, last_query - window + 1 - key_at)
        if not CAUSAL:
            end = tl.minimum(end, last_query + window - key_at)
            whole_end = tl.minimum(whole_end, first_query + window - key_at)
    start = start // BLOCK * BLOCK
    whole_start = tl.cdiv(whole_start, BLOCK) * BLOCK
    whole_end = tl.maximum(whole_end, 0) // BLOCK * BLOCK
    any_whole = whole_start < whole_end
    # Without whole blocks the last of the three ranges is all: the first exists with a window alone.
    return start, tl.where(any_whole, whole_start, start), tl.where(any_whole, whole_end, start), end


@triton.jit
def visible_queries(
    first_key, last_key, query_at, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr
):
    """As `visible_keys`, of queries that see the keys at these positions; a block cut by `length` counts as whole."""
    start = 0
    end = length
    whole_start = 0
    whole_end = length
    if CAUSAL:
        start = tl.maximum(0, first_key - query_at)
        whole_start = tl.maximum(0, last_key - query_at)
    if WINDOW:
        end = tl.minimum(end, last_key + window - query_at)
        whole_end = tl.minimum(whole_end, first_key + window - query_at)
        if not CAUSAL:
            start = tl.maximum(0, first_key - window + 1 - query_at)
            whole_start = tl.maximum(0, last_key - window + 1 - query_at)
    start = start // BLOCK * BLOCK
    whole_start = tl.cdiv(whole_start, BLOCK) * BLOCK
    whole_end = tl.where(whole_end >= length, tl.cdiv(length, BLOCK), tl.maximum(whole_end, 0) // BLOCK) * BLOCK
    any_whole = whole_start < whole_end
    # Without whole blocks the first of the three ranges is all: the last exists with a window alone.
    end = tl.maximum(end, start)
    return start, tl.where(any_whole, whole_start, end), tl.where(any_whole, whole_end, end), end


@triton.jit
def sees(query_at, key_at, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether queries see keys by their positions, which broadcast."""
    seen = (query_at == query_at) & (key_at == key_at)
    if CAUSAL:
        seen = seen & (key_at <= query_at)
    if WINDOW:
        seen = seen & (query_at - key_at < window)
        if not CAUSAL:
            seen = seen & (key_at - query_at < window)
    return seen


@triton.jit
def tanh(x):
    """Within 2e-7 of tanh: what a float32 score loses anyhow."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def bias_tile(base, queries, keys, is_inside, stride_q, stride_k):
    """The bias of a tile in units of log2, 0 outside; `queries` and `keys` are rows and broadcast."""
    pointers = base + tl.cast(queries, tl.int64) * stride_q + tl.cast(keys, tl.int64) * stride_k
    return tl.load(pointers, mask=is_inside, other=0.0).to(tl.float32) * LOG2_E
