"""How much shared memory a program of each kernel takes, by compiling for several GPUs on a machine without one.

    python tests/attention/kernels/compile_shared.py

prints, for every kernel, head size and width of the dtype, the most bytes (`metadata.shared` of `triton.compile`) over
layouts and features by compute capability, from which the table in tiles.py is written. It takes ten minutes.
test_compilation.py gives it `-`: then it answers every line of stdin, which is
`kernel:head size:layout:dtype:features:capability`, with a line of JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections import defaultdict

import torch
from compile_sm90 import Options, compile_launch, launch_of
from triton.backends.nvidia.compiler import CUDABackend

from rlhf_cli.attention.kernels.decode import launches
from rlhf_cli.attention.kernels.launch import Launch
from rlhf_cli.attention.layout import Layout, Segment

# 8.6 gets the tiles of 8.0, and 12.0 those of 8.9; with the same tile all of them get the same code.
CAPABILITIES = (80, 89, 90, 100)
FEATURES = ("", "window,softcap,sinks", "window,softcap,sinks,bias")
DTYPES = ("bfloat16", "float32")


def decode_launch(head_size: int, dtype: str, features: str) -> Launch:
    """The kernel that reads keys, with as many rows as it ever has."""
    answers = (Segment(number, 1, 2048 + 8 * number, 8, 0) for number in range(32))
    layout = Layout(1, 32, 2048 + 8 * 32, (Segment(0, 0, 0, 2048), *answers))
    query, key, value = (
        torch.empty(1, heads, length, head_size, dtype=getattr(torch, dtype))
        for heads, length in ((8, layout.query_length), (2, layout.key_length), (2, layout.key_length))
    )
    is_limited = "window" in features
    rules = {"window": 256 if is_limited else None, "softcap": 50.0 if is_limited else None, "sinks": None}
    return launches(query, key, value, layout, scale=1.0, causal="full" not in features, **rules)[0]


def shared_memory(kernel: str, head_size: int, layout: str, dtype: str, features: str, capability: int) -> int:
    """Bytes a program takes."""
    if kernel == "decode":
        found = decode_launch(head_size, dtype, features)
    else:
        found = launch_of(Options(kernel, head_size, layout, dtype, features, capability))
    return compile_launch(found, capability).metadata.shared


def everything() -> None:
    """Every line of the table."""
    for kernel, dtype, size in itertools.product(("forward", "dkdv", "dq", "decode"), DTYPES, (64, 128, 256)):
        most: dict[bool, dict[int, int]] = defaultdict(dict)
        layouts = ("dense", "tree") if kernel in ("forward", "dq") else ("dense",)
        for layout, features, capability in itertools.product(layouts, FEATURES, CAPABILITIES):
            has_bias = "bias" in features
            if capability == 89 and kernel != "dkdv":
                continue
            if kernel == "decode" and has_bias:
                continue
            bytes_ = shared_memory(kernel, size, layout, dtype, features, capability)
            most[has_bias][capability] = max(most[has_bias].get(capability, 0), bytes_)
        for has_bias, found in most.items():
            name = f"{kernel}, {dtype}, head size {size}{', bias' if has_bias else ''}"
            print(f"{name}: {found}", flush=True)


def main() -> None:
    """Answer questions, or print everything."""
    CUDABackend.make_cubin = lambda *_, **__: b""  # shared memory is known before ptxas, which takes most of the time
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # in the user's, empty machine code would be found by those who run it
        if sys.argv[1:] != ["-"]:
            everything()
            return
        for line in sys.stdin:
            kernel, size, layout, dtype, features, capability = line.strip().split(":")
            found = shared_memory(kernel, int(size), layout, dtype, features, int(capability))
            print(json.dumps({"shared": found}), flush=True)


if __name__ == "__main__":
    main()
