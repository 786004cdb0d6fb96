"""How large the kernels' tiles are: one table, no search at run time."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys of one block, and how a GPU runs it."""

    queries: int
    keys: int
    warps: int
    stages: int


def tile(
    kernel: str,
    head_size: int,
    *,
    is_32_bit: bool,
    is_tree: bool,
    has_softcap: bool,
    has_bias: bool,
    capability: int,
    interpreted: bool,
) -> Tile:
    """The tile of a kernel.

    Args:
        kernel: `forward`, `dkdv` or `dq`.
        head_size: the larger of D and Dv, padded to a power of two: 16 to 256.
        is_32_bit: whether the inputs are float32.
        is_tree: whether the layout is a prefix tree, whose loop over ancestors takes registers.
        has_softcap: whether scores get a softcap, whose slope the backward kernels keep.
        has_bias: whether scores get a bias, whose tile is loaded beside those of keys and values.
        capability: compute capability of the GPU, as 89 for 8.9.
        interpreted: small tiles, unequal sides, so that short inputs have several and a swap of sides shows.
    """
    if interpreted:
        return Tile(16, 32, 4, 1) if kernel == "dkdv" else Tile(32, 16, 4, 1)
    size = max(head_size, 64)
    if is_32_bit:
        return _TILES_32_BIT[kernel][size]
    table = _tiles(capability)
    cases = {"bias, tree": has_bias and is_tree, "bias": has_bias, "softcap": has_softcap, "tree": is_tree, "": True}
    return next(
        table[kernel, case][size]
        for case, applies in cases.items()
        if applies and size in table.get((kernel, case), ())
    )


def _tiles(capability: int) -> dict[tuple[str, str], dict[int, Tile]]:
    """The table of 16-bit tiles for a GPU; 10 has shared memory and matrix units as 9 has, and 12 as 8.9 has."""
    if 90 <= capability < 120:
        return _TILES_HOPPER
    return _TILES_AMPERE if capability < 89 else _TILES_ADA


# By kernel and case ("" is any other), then by head size. Chosen by compiling for sm_80, sm_89 and sm_90 with Triton
# 3.7.1, not by measuring: no GPU was at hand. Where a tile is smaller than the one above, the larger spilled registers.
_TILES_HOPPER = {
    ("forward", ""): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
    ("forward", "bias"): {128: Tile(128, 32, 8, 3)},
    ("forward", "bias, tree"): {128: Tile(64, 32, 8, 2)},
    ("dkdv", ""): {64: Tile(64, 128, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    ("dkdv", "softcap"): {64: Tile(64, 64, 8, 2)},
    ("dkdv", "bias"): {64: Tile(64, 64, 8, 1), 128: Tile(16, 64, 8, 1)},
    ("dq", ""): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    ("dq", "tree"): {128: Tile(128, 32, 8, 3)},
    ("dq", "bias"): {128: Tile(128, 32, 8, 3)},
    ("dq", "bias, tree"): {128: Tile(64, 32, 8, 1)},
}
_TILES_AMPERE = {
    ("forward", ""): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
    ("forward", "bias"): {64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 8, 2)},
    ("dkdv", ""): {64: Tile(64, 32, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    ("dkdv", "bias"): {64: Tile(32, 64, 8, 1), 128: Tile(64, 64, 8, 1)},
    ("dq", ""): {64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 2)},
    ("dq", "tree"): {128: Tile(64, 64, 8, 2)},
    ("dq", "bias"): {64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 8, 2)},
    ("dq", "bias, tree"): {64: Tile(64, 32, 8, 1)},
}
_TILES_ADA = _TILES_AMPERE | {
    ("dkdv", ""): {64: Tile(64, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    ("dkdv", "softcap"): {64: Tile(32, 64, 8, 2)},
}
_TILES_32_BIT = {
    "forward": {64: Tile(64, 32, 8, 2), 128: Tile(32, 16, 8, 2), 256: Tile(32, 16, 8, 1)},
    "dkdv": {64: Tile(32, 32, 8, 2), 128: Tile(32, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
    "dq": {64: Tile(64, 32, 8, 2), 128: Tile(64, 16, 8, 2), 256: Tile(32, 16, 8, 1)},
}


@cache  # asked at every call
def shared_memory(head_size: int, *, is_32_bit: bool, has_bias: bool, needs_grad: bool, capability: int) -> int:
    """Bytes of shared memory that a call's largest program takes on a GPU.

    Args:
        head_size: the larger of D and Dv, at most 256.
        is_32_bit: whether the inputs are float32.
        has_bias: whether scores get a bias, whose tiles lie in shared memory too.
        needs_grad: whether the backward kernels run as well; without, the decode kernel may.
        capability: major number of the GPU's compute capability.
    """
    column = next(number for number, largest in enumerate((64, 128, 256)) if head_size <= largest)
    kernels = ("forward", "dkdv", "dq") if needs_grad else ("forward", "decode")
    half = {8: _SHARED_AMPERE, 9: _SHARED_HOPPER, 12: _SHARED_AMPERE}.get(capability, _SHARED_BLACKWELL)
    table = _SHARED_32_BIT if is_32_bit else half
    return max(table[kernel, has_bias][column] for kernel in kernels if (kernel, has_bias) in table)


# By kernel and whether there is a bias, for head sizes up to 64, 128 and 256: `metadata.shared` of `triton.compile`
# (Triton 3.7.1), the most over layouts and other features; tests/attention/kernels/compile_shared.py prints it. Compute
# capability 8 and 12 get the same code for the same tile, and the larger of two tiles is entered; the tensor cores of 9
# and 10 read operands from shared memory.
_SHARED_AMPERE = {
    ("forward", False): (49152, 98304, 147456),
    ("forward", True): (40960, 45056, 180224),
    ("dkdv", False): (33024, 73984, 81920),
    ("dkdv", True): (32768, 81920, 81920),
    ("dq", False): (65536, 98304, 102400),
    ("dq", True): (49152, 61440, 110592),
    ("decode", False): (40960, 90112, 86016),
}
_SHARED_HOPPER = {
    ("forward", False): (65536, 131072, 196608),
    ("forward", True): (131072, 114688, 229376),
    ("dkdv", False): (65792, 65664, 81920),
    ("dkdv", True): (40960, 45056, 81920),
    ("dq", False): (81920, 131072, 131072),
    ("dq", True): (147456, 147456, 139264),
    ("decode", False): (57344, 114688, 86016),
}
_SHARED_BLACKWELL = {
    ("forward", False): (70656, 140288, 204832),
    ("forward", True): (136192, 115232, 237600),
    ("dkdv", False): (82944, 82944, 81920),
    ("dkdv", True): (49152, 45056, 81920),
    ("dq", False): (91136, 148480, 148480),
    ("dq", True): (156672, 155696, 156672),
    ("decode", False): (57376, 114720, 86016),
}
_SHARED_32_BIT = {
    ("forward", False): (41216, 34944, 51200),
    ("forward", True): (49408, 36992, 51200),
    ("dkdv", False): (36992, 69632, 100352),
    ("dkdv", True): (41088, 73728, 102400),
    ("dq", False): (57344, 86016, 98304),
    ("dq", True): (65536, 90112, 98304),
    ("decode", False): (28800, 53248, 50240),
}
