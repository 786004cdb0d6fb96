"""From tensors to a kernel with its grid, arguments and tile: what a GPU runs and the compile tests compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.attention.kernels import schedule
from rlhf_cli.attention.kernels.arguments import capability_of, padded, score_rules, strides
from rlhf_cli.attention.kernels.backward import dkdv_kernel, dq_kernel, row_sums_kernel
from rlhf_cli.attention.kernels.device import INTERPRETED
from rlhf_cli.attention.kernels.forward import forward_kernel
from rlhf_cli.attention.kernels.tiles import Tile, tile
from rlhf_cli.attention.layout import Layout


@dataclass(frozen=True)
class Call:
    """The arguments of one attention call; last dimensions have stride 1, and `bias` is expanded to (B, H, Lq, Lk)."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    bias: Tensor | None
    layout: Layout
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    capability: int | None = None
    """Compute capability of the GPU to run on, as 89 for 8.9; None: that of the tensors' device."""

    @property
    def heads(self) -> int:
        """H, query heads."""
        return self.query.shape[1]

    @property
    def blocks(self) -> tuple[int, int]:
        """D and Dv, each padded to a power of two that a tensor core takes."""
        return padded(self.query.shape[-1]), padded(self.value.shape[-1])

    def tile(self, kernel: str) -> Tile:
        """The tile of a kernel."""
        return tile(
            kernel,
            max(self.blocks),
            is_32_bit=self.query.dtype == torch.float32,
            is_tree=self.layout.is_tree,
            has_softcap=self.softcap is not None,
            has_bias=self.bias is not None,
            capability=self.capability or capability_of(self.query.device),
            interpreted=bool(INTERPRETED),
        )

    def tiles(self, kernel: str) -> Tensor:
        """The blocks a kernel works on."""
        size = self.tile(kernel)
        device = self.query.device
        if kernel == "dkdv":
            return schedule.key_tiles(self.layout, size.keys, device, causal=self.causal, window=self.window)
        return schedule.query_tiles(self.layout, size.queries, device, causal=self.causal, window=self.window)

    def tables(self) -> schedule.Tables:
        """The segments."""
        return schedule.tables(self.layout, self.query.device)


@dataclass(frozen=True)
class Launch:
    """A kernel with all it needs."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    tile: Tile

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told; Triton 3.10 changes the default of fusing products with sums."""
        return {"num_warps": self.tile.warps, "num_stages": self.tile.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Start it; without programs there is nothing to do."""
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def forward(call: Call, output: Tensor, logsumexp: Tensor) -> Launch:
    """Fills `output` and `logsumexp` on every row of a segment."""
    size, tiles, tables = call.tile("forward"), call.tiles("forward"), call.tables()
    arguments = _shared(call, size) | {
        "sinks": call.sinks,
        "output": output,
        "logsumexp": logsumexp,
        "tiles": tiles,
        "segments": tables.segments,
        "chains": tables.chains,
        **strides("output", output),
        "TREE": call.layout.is_tree,
        "SINKS": call.sinks is not None,
        # A product with a negative scale would swap highest and lowest.
        "FOLD": call.softcap is None and call.bias is None and call.scale > 0,
    }
    return Launch(forward_kernel, len(tiles) * call.heads, arguments, size)


def row_sums(
    call: Call,
    output: Tensor,
    d_output: Tensor,
    logsumexp: Tensor,
    d_logsumexp: Tensor | None,
    origin: Tensor,
    delta: Tensor,
) -> Launch:
    """Fills `origin` and `delta`, (B, H, Lq) each: what scores are measured from, and rowsum(dO * O) - dL."""
    size, tiles = call.tile("dq"), call.tiles("dq")
    arguments = {
        "output": output,
        "d_output": d_output,
        "logsumexp": logsumexp,
        "d_logsumexp": d_logsumexp,
        "origin": origin,
        "delta": delta,
        "tiles": tiles,
        "segments": call.tables().segments,
        **strides("output", output),
        **strides("d_output", d_output),
        **strides("d_logsumexp", d_logsumexp),
        "heads": call.heads,
        "rows": call.layout.query_length,
        "VALUE_SIZE": call.value.shape[-1],
        "VALUE_BLOCK": call.blocks[1],
        "QUERIES": size.queries,
        "D_LOGSUMEXP": d_logsumexp is not None,
    }
    return Launch(row_sums_kernel, len(tiles) * call.heads, arguments, size)


def dq(call: Call, d_output: Tensor, origin: Tensor, delta: Tensor, d_query: Tensor, d_bias: Tensor | None) -> Launch:
    """Fills `d_query` on every row of a segment, and `d_bias` (B, H, Lq, Lk) wherever a query sees a key."""
    size, tiles, tables = call.tile("dq"), call.tiles("dq"), call.tables()
    arguments = _shared(call, size) | {
        "d_output": d_output,
        "origin": origin,
        "delta": delta,
        "d_query": d_query,
        "d_bias": d_bias,
        "tiles": tiles,
        "segments": tables.segments,
        "chains": tables.chains,
        **strides("d_output", d_output),
        **strides("d_query", d_query),
        **strides("d_bias", d_bias),
        "scale": call.scale,
        "TREE": call.layout.is_tree,
        "D_BIAS": d_bias is not None,
    }
    return Launch(dq_kernel, len(tiles) * call.heads, arguments, size)


def dkdv(call: Call, d_output: Tensor, origin: Tensor, delta: Tensor, d_key: Tensor, d_value: Tensor) -> Launch:
    """Fills `d_key` and `d_value` on every row of a segment."""
    size, tiles = call.tile("dkdv"), call.tiles("dkdv")
    arguments = _shared(call, size) | {
        "d_output": d_output,
        "origin": origin,
        "delta": delta,
        "d_key": d_key,
        "d_value": d_value,
        "tiles": tiles,
        "segments": call.tables().segments,
        **strides("d_output", d_output),
        **strides("d_key", d_key),
        **strides("d_value", d_value),
        "scale": call.scale,
    }
    return Launch(dkdv_kernel, len(tiles) * call.key.shape[1], arguments, size)


def _shared(call: Call, size: Tile) -> dict[str, Any]:
    """What forward, dQ and dK/dV all take."""
    return score_rules(call.scale, call.softcap, causal=call.causal, window=call.window) | {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "bias": call.bias,
        **strides("query", call.query),
        **strides("key", call.key),
        **strides("value", call.value),
        **strides("bias", call.bias),
        "bias_k": 0 if call.bias is None else call.bias.stride(3),
        "heads": call.heads,
        "rows": call.layout.query_length,
        "GROUP": call.heads // call.key.shape[1],
        "HEAD_SIZE": call.query.shape[-1],
        "VALUE_SIZE": call.value.shape[-1],
        "HEAD_BLOCK": call.blocks[0],
        "VALUE_BLOCK": call.blocks[1],
        "QUERIES": size.queries,
        "KEYS": size.keys,
        "BIAS": call.bias is not None,
    }
