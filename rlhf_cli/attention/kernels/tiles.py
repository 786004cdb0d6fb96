"""How large the kernels' tiles are: one table, no search at run time."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys of one block, and how a GPU runs it."""

    queries: int
    keys: int
    warps: int
    stages: int


def tile(kernel: str, head_size: int, *, is_32_bit: bool, is_tree: bool, interpreted: bool) -> Tile:
    """The tile of a kernel.

    Args:
        kernel: `forward`, `dkdv` or `dq`.
        head_size: the larger of D and Dv, padded to a power of two: 16 to 256.
        is_32_bit: whether the inputs are float32.
        is_tree: whether the layout is a prefix tree, whose loop over ancestors takes registers.
        interpreted: small tiles, unequal sides, so that short inputs have several and a swap of sides shows.
    """
    if interpreted:
        return Tile(16, 32, 4, 1) if kernel == "dkdv" else Tile(32, 16, 4, 1)
    size = max(head_size, 64)
    if is_32_bit:
        return _TILES_32_BIT[kernel][size]
    return _TILES_OF_TREES.get((kernel, size), _TILES[kernel][size]) if is_tree else _TILES[kernel][size]


# Chosen by compiling for sm_90, not by measuring: no GPU was at hand. None of them spills a register at head sizes 64
# and 128 with 16 bits; at 128, forward with 128 keys does over trees, and dkdv with 64 queries does everywhere.
_TILES = {
    "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
    "dkdv": {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(32, 32, 8, 1)},
    "dq": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
}
_TILES_OF_TREES = {("dq", 128): Tile(128, 32, 8, 3)}
_TILES_32_BIT = {
    "forward": {64: Tile(64, 32, 8, 2), 128: Tile(32, 16, 8, 2), 256: Tile(32, 16, 8, 1)},
    "dkdv": {64: Tile(32, 32, 8, 2), 128: Tile(32, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
    "dq": {64: Tile(64, 32, 8, 2), 128: Tile(64, 16, 8, 2), 256: Tile(32, 16, 8, 1)},
}
