"""The grid of attention calls on which the kernels are held to FlashAttention's rule, by feature.

A case's tensors come from its name alone, so that it is the same in every process and order.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlhf_cli.attention.layout import Layout, Segment

INF = float("inf")


@dataclass(frozen=True)
class Case:
    """One call. `bias` is a shape that broadcasts to (B, H, Lq, Lk)."""

    name: str
    layout: Layout
    head_size: int = 32
    heads: tuple[int, int] = (2, 1)
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    sinks_view: str = "whole"
    bias: tuple[int, ...] | None = None
    hides_by_bias: bool = False
    value_size: int | None = None
    scale: float | None = None
    has_loss_of_logsumexp: bool = True
    strided: bool = False

    @property
    def settings(self) -> dict:
        """Arguments of the call that are no tensors."""
        scale = self.head_size**-0.5 if self.scale is None else self.scale
        return {"scale": scale, "causal": self.causal, "window": self.window, "softcap": self.softcap}


# How many numbers the leaf has for a number of heads, and how the call sees them.
SINKS_VIEWS: dict[str, tuple[Callable[[int], int], Callable[[Tensor, int], Tensor]]] = {
    "whole": (lambda heads: heads, lambda leaf, heads: leaf),
    "every other": (lambda heads: 2 * heads, lambda leaf, heads: leaf[::2]),
    "one for all": (lambda heads: 1, lambda leaf, heads: leaf.expand(heads)),
}


@dataclass
class Inputs:
    """Tensors of a case: `leaves` get gradients, the others are what the loss weighs output and log-sum-exp with."""

    leaves: dict[str, Tensor]
    d_output: Tensor
    d_logsumexp: Tensor | None = None
    padding: list[str] = field(default_factory=list)


def inputs(case: Case) -> Inputs:
    """Normal numbers; NaN on padding rows of queries, keys and values."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    layout, (heads, key_heads) = case.layout, case.heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    def rows(heads: int, length: int, size: int) -> Tensor:
        if case.strided:  # as a model's projections lie in memory, and a gap besides
            return normal(layout.batch, length, heads, size + 4)[..., :size].transpose(1, 2)
        return normal(layout.batch, heads, length, size)

    value_size = case.value_size or case.head_size
    query = rows(heads, layout.query_length, case.head_size)
    key = rows(key_heads, layout.key_length, case.head_size)
    value = rows(key_heads, layout.key_length, value_size)
    query.masked_fill_(~layout.is_real()[:, None, :, None], torch.nan)
    for tensor in (key, value):
        tensor.masked_fill_(~layout.is_real_key()[:, None, :, None], torch.nan)
    leaves = {"query": query, "key": key, "value": value}
    if case.has_sinks:
        leaves["sinks"] = normal(SINKS_VIEWS[case.sinks_view][0](heads))
    if case.bias is not None:
        bias = normal(*case.bias)
        if case.hides_by_bias:
            bias[torch.rand(bias.shape, generator=generator) < 0.3] = -INF
        leaves["bias"] = bias
    d_output = normal(layout.batch, heads, layout.query_length, value_size)
    d_logsumexp = normal(layout.batch, heads, layout.query_length).float() if case.has_loss_of_logsumexp else None
    return Inputs(leaves, d_output, d_logsumexp)


def padded(*lengths: int, width: int, left: bool) -> Layout:
    """One sequence of a length in each batch row."""
    columns = torch.arange(width)
    length = torch.tensor(lengths).unsqueeze(1)
    return Layout.padded(columns >= width - length if left else columns < length)


def deep_tree() -> Layout:
    """Answers to answers: three generations, some empty."""
    lengths = [(33, -1), (18, 0), (7, 1), (0, 1), (21, 0), (0, 0), (5, 5), (12, -1), (3, 7)]
    segments, at = [], 0
    for length, parent in lengths:
        segments.append(Segment(at, length, at, length, parent))
        at += length
    return Layout(1, at, at, tuple(segments))


def decoding_tree() -> Layout:
    """A shared prompt nobody asks from, and two answers that ask their last rows alone."""
    return Layout(1, 3, 70, (Segment(0, 0, 0, 40), Segment(0, 1, 40, 18, 0), Segment(1, 2, 58, 12, 0)))


def gapped() -> Layout:
    """Two batch rows with padding in front, between and behind."""
    segments = (Segment(3, 20, 3, 20), Segment(30, 9, 30, 9), Segment(50, 35, 50, 35))
    return Layout(2, 45, 45, segments)


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "dense": lambda: Layout.dense(1, 70),
    "packed": lambda: Layout.packed([[37, 0, 20, 1], [5, 33]]),
    "left": lambda: padded(40, 17, 0, width=40, left=True),
    "right": lambda: padded(17, 40, 1, width=40, left=False),
    "gapped": gapped,
    "tree": lambda: Layout.tree([(35, [20, 0, 17]), (2, [3])]),
    "deep": deep_tree,
    "decoding": decoding_tree,
    "cached": lambda: Layout.dense(2, 5, 60),
    "chunk": lambda: Layout.padded(
        torch.arange(50).expand(2, -1) >= torch.tensor([[9], [0]]), query_length=20, query_offset=30
    ),
    "cross": lambda: Layout.cross(34, torch.arange(47) < torch.tensor([[47], [19]])),
    "more queries": lambda: Layout.dense(1, 50, 21),
}
FEATURES: dict[str, dict] = {
    "plain": {},
    "full": {"causal": False},
    "window": {"window": 9},
    "window of one": {"window": 1},
    "full, window": {"window": 20, "causal": False},
    "softcap": {"softcap": 2.0},
    "sinks": {"has_sinks": True},
    "bias": {"bias": "full"},
    "all": {"window": 25, "softcap": 3.0, "has_sinks": True, "bias": "full", "hides_by_bias": True},
}


def grid() -> Iterator[Case]:
    """Every case, one after another by family."""
    yield from _lengths()
    yield from _windows()
    yield from _layouts_by_features()
    yield from _heads_and_sizes()
    yield from _biases()
    yield from _oddities()
    yield from _bfloat16()


def _lengths() -> Iterator[Case]:
    """Lengths around the sides of a tile, odd pairs among them."""
    pairs = [(n, n) for n in (1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 65, 97, 128, 129)]
    pairs += [(1, 33), (2, 31), (3, 64), (16, 17), (31, 33), (33, 127), (64, 65), (113, 203), (108, 256)]
    for (queries, keys), causal, dtype in itertools.product(pairs, (True, False), (torch.float32, torch.float16)):
        name = f"{queries} by {keys}, {'causal' if causal else 'full'}, {_short(dtype)}"
        yield Case(name, Layout.dense(1, queries, keys), heads=(1, 1), causal=causal, dtype=dtype)
    for queries, keys in ((203, 113), (65, 33), (33, 1)):
        yield Case(f"{queries} by {keys}, causal", Layout.dense(1, queries, keys), heads=(1, 1))
        yield Case(f"{queries} by {keys}, full", Layout.dense(1, queries, keys), heads=(1, 1), causal=False)
    yield Case("311 long", Layout.dense(1, 311), heads=(1, 1))
    yield Case("311 long, window", Layout.dense(1, 311), heads=(1, 1), window=40)


def _windows() -> Iterator[Case]:
    """Windows whose edges fall on, before and behind the edges of tiles."""
    for window, causal in itertools.product((17, 18, 47, 49, 50, 64, 66), (True, False)):
        name = f"edge of a window of {window}, {'causal' if causal else 'full'}"
        yield Case(name, Layout.dense(1, 128), heads=(1, 1), window=window, causal=causal)


def _layouts_by_features() -> Iterator[Case]:
    for (layout, build), (feature, settings) in itertools.product(LAYOUTS.items(), FEATURES.items()):
        for dtype in (torch.float32, torch.float16):
            case = Case(f"{layout}: {feature}, {_short(dtype)}", build(), dtype=dtype, strided=True)
            yield replace(case, **_bias_shaped(settings, case))


def _heads_and_sizes() -> Iterator[Case]:
    layouts = {"packed": LAYOUTS["packed"], "tree": LAYOUTS["tree"]}
    for (layout, build), heads in itertools.product(layouts.items(), ((2, 2), (3, 1), (4, 2), (6, 2))):
        yield Case(f"{layout}: {heads[0]} heads on {heads[1]}", build(), heads=heads)
    for size, dtype in itertools.product(
        (16, 20, 24, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256), (torch.float32, torch.float16)
    ):
        name = f"head size {size}, {_short(dtype)}"
        yield Case(name, Layout.packed([[33, 14]]), head_size=size, dtype=dtype)
        yield Case(f"{name}, tree", Layout.tree([(19, [9, 21])]), head_size=size, dtype=dtype, strided=True)
    for size, value_size in ((16, 40), (64, 16), (96, 64), (24, 128)):
        yield Case(f"head size {size}, values {value_size}", Layout.dense(1, 37), head_size=size, value_size=value_size)


def _biases() -> Iterator[Case]:
    shapes = {"heads": (1, 2, 1, 1), "keys": (40,), "rows": (2, 1, 40, 1), "scores": (40, 40), "batch": (2, 1, 1, 40)}
    for (name, shape), causal, hides in itertools.product(shapes.items(), (True, False), (True, False)):
        label = f"bias of {name}, {'causal' if causal else 'full'}{', hiding' if hides else ''}"
        yield Case(label, Layout.dense(2, 40), bias=shape, causal=causal, hides_by_bias=hides)
    yield Case("bias hides all", Layout.packed([[9, 12]]), bias=(1, 1, 21, 21), hides_by_bias=True, heads=(1, 1))


def _oddities() -> Iterator[Case]:
    dense = Layout.dense(1, 41)
    yield Case("scale 1", dense, scale=1.0)
    yield Case("scale of large scores", dense, scale=5.0)
    yield Case("negative scale", dense, scale=-0.2)
    yield Case("scale 0", dense, scale=0.0)
    yield Case("nothing is real", padded(0, 0, width=20, left=True))
    yield Case("nothing is real, sinks", padded(0, 0, width=20, left=True), has_sinks=True)
    yield Case("no segments", Layout(1, 18, 18, ()))
    yield Case("no keys, sinks", Layout(1, 20, 20, (Segment(0, 20, 0, 0),)), has_sinks=True)
    yield Case("no queries", Layout(1, 20, 20, (Segment(0, 0, 0, 20),)))
    for view in ("every other", "one for all"):
        yield Case(f"sinks that lie apart, {view}", dense, heads=(6, 2), has_sinks=True, sinks_view=view)
    yield Case("window wider than all", dense, window=10**12)
    yield Case("small softcap", dense, softcap=0.1)
    yield Case("large softcap", dense, softcap=50.0, scale=3.0)
    for name in ("dense", "packed", "tree"):
        yield Case(f"{name}: no loss of the log-sum-exp", LAYOUTS[name](), has_loss_of_logsumexp=False)
    yield Case("wide tree", Layout.tree([(20, [3] * 12)]), heads=(2, 2))
    yield Case("chain", Layout(1, 60, 60, tuple(Segment(10 * n, 10, 10 * n, 10, n - 1) for n in range(6))), window=23)


def _bfloat16() -> Iterator[Case]:
    """Every feature, and the head sizes that models have, for a GPU: the interpreter rounds bfloat16 wrongly."""
    dtype = torch.bfloat16
    for layout, (feature, settings) in itertools.product(("packed", "deep", "chunk"), FEATURES.items()):
        case = Case(f"{layout}: {feature}, {_short(dtype)}", LAYOUTS[layout](), 64, dtype=dtype, strided=True)
        yield replace(case, **_bias_shaped(settings, case))
    for size in (16, 64, 80, 96, 128, 256):
        yield Case(f"head size {size}, {_short(dtype)}", Layout.dense(1, 311), size, heads=(4, 2), dtype=dtype)
        tree = Layout.tree([(190, [90, 210])])
        yield Case(f"head size {size}, {_short(dtype)}, tree", tree, size, dtype=dtype, strided=True)


def _bias_shaped(settings: dict, case: Case) -> dict:
    if "bias" not in settings:
        return settings
    shape = (case.layout.batch, case.heads[0], case.layout.query_length, case.layout.key_length)
    return settings | {"bias": shape}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES = {case.name: case for case in grid()}


def chosen() -> list[str]:
    """What CI runs: every layout under some feature, every feature on some layouts, and a part of each other family.

    Of bfloat16 all: a GPU, which alone can run them, is fast.
    """
    bfloat16 = [name for name, case in CASES.items() if case.dtype == torch.bfloat16]
    names = [name for name in CASES if name not in bfloat16]
    mixed = [name for name in names if name.split(":")[0] in LAYOUTS and name.endswith(("float32", "float16"))]
    edges = [name for name in names if name.startswith("edge of a window")]
    apart = [name for name in names if name.startswith("sinks that lie apart")]
    others = [name for name in names if name not in mixed and name not in edges and name not in apart]
    return mixed[::4] + edges + apart + others[::4] + bfloat16
