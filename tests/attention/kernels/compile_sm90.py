"""Compile kernels for Hopper and other GPUs on a machine without one and say what the machine code holds, as JSON.

Run as a program, since Triton must not be the interpreter: test_compilation.py does. What is compiled is what
`launch` would start, its tile, constants and strides included.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlhf_cli.attention.kernels import launch
from rlhf_cli.attention.layout import Layout

LAYOUTS = {
    "dense": lambda: Layout.dense(2, 1024),
    "tree": lambda: Layout.tree([(1024, [512, 512])]),
}


@dataclass(frozen=True)
class Options:
    """What to compile: `kernel:head size:layout[:dtype[:feature,feature...[:capability]]]`."""

    kernel: str
    head_size: int
    layout: str
    dtype: str = "bfloat16"
    features: str = ""
    capability: int = 90

    @classmethod
    def of(cls, text: str) -> Options:
        """The options that a line names."""
        kernel, head_size, layout, *rest = text.split(":")
        capability = int(rest.pop()) if len(rest) == 3 else 90
        return cls(kernel, int(head_size), layout, *rest, capability=capability)


def launch_of(options: Options) -> launch.Launch:
    """The launch of a kernel over tensors that hold nothing."""
    layout, features = LAYOUTS[options.layout](), options.features.split(",")

    def tensor(heads: int) -> torch.Tensor:
        shape = (layout.batch, layout.query_length, heads, options.head_size)
        return torch.empty(shape, dtype=getattr(torch, options.dtype)).transpose(1, 2)

    query, key, value = tensor(8), tensor(2), tensor(2)
    rows = torch.empty(query.shape[:3])
    call = launch.Call(
        query,
        key,
        value,
        torch.empty(8) if "sinks" in features else None,
        torch.empty(1, 8, 1024, 1024).expand(layout.batch, -1, -1, -1) if "bias" in features else None,
        layout,
        scale=options.head_size**-0.5,
        causal="full" not in features,
        window=256 if "window" in features else None,
        softcap=50.0 if "softcap" in features else None,
        capability=options.capability,
    )
    if options.kernel == "forward":
        return launch.forward(call, tensor(8), rows)
    if options.kernel == "dq":
        return launch.dq(call, tensor(8), rows, rows, tensor(8), None)
    return launch.dkdv(call, tensor(8), rows, rows, tensor(2), tensor(2))


def compile_launch(found: launch.Launch, capability: int = 90) -> Any:
    """Machine code for sm_90 or another GPU, with Triton's own rules for what a launch specializes."""
    constants = {param.name for param in found.kernel.params if param.is_constexpr}
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(found.kernel.arg_names):
        argument = found.arguments[name]
        is_one = isinstance(argument, int) and argument == 1
        if name in constants or argument is None or is_one:
            signature[name], constexprs[name] = "constexpr", argument
        elif isinstance(argument, torch.Tensor):
            signature[name] = f"*{SHORT[argument.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(argument, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if argument % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(found.kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=found.options)


SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}


def inspect(cubin: bytes) -> dict[str, int]:
    """What the machine code holds, by cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "hgmma": len(re.findall(r"\bHGMMA", code)),
        "hmma": len(re.findall(r"\bHMMA", code)),
        "spill_stores": len(re.findall(r"\bSTL\b|\bSTL\.", code)),
        "spill_loads": len(re.findall(r"\bLDL\b|\bLDL\.", code)),
    }


def main() -> None:
    """One JSON line for every line of stdin."""
    assert not os.environ.get("TRITON_INTERPRET"), "the interpreter compiles nothing"
    for line in sys.stdin:
        text = line.strip()
        options = Options.of(text)
        found = launch_of(options)
        compiled = compile_launch(found, options.capability)
        facts = {"name": text, "tile": found.tile, "shared": compiled.metadata.shared, **inspect(compiled.asm["cubin"])}
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
