"""Compile the decode kernels for Hopper and print what the machine code holds, as JSON. See compile_sm90.py.

Arguments: `head size:layout[:dtype][:feature,feature...]`.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from compile_sm90 import compile_launch, inspect

from rlhf_cli.attention.kernels.decode import launches
from rlhf_cli.attention.layout import Layout, Segment


def after_a_prompt(answers: int) -> Layout:
    """Answers of eight tokens each after a prompt of 2,048."""
    own = (Segment(number, 1, 2048 + 8 * number, 8, 0) for number in range(answers))
    return Layout(1, answers, 2048 + 8 * answers, (Segment(0, 0, 0, 2048), *own))


LAYOUTS = {"shared": after_a_prompt(8), "many": after_a_prompt(32), "lone": Layout.dense(4, 1, 2048)}


def main() -> None:
    """One JSON line for every argument and kernel."""
    assert not os.environ.get("TRITON_INTERPRET"), "the interpreter compiles nothing"
    for text in sys.argv[1:]:
        size, name, dtype, features, *_ = (*text.split(":"), "", "")
        layout = LAYOUTS[name]
        query, key, value = (
            torch.empty(layout.batch, heads, length, int(size), dtype=getattr(torch, dtype or "bfloat16"))
            for heads, length in ((8, layout.query_length), (2, layout.key_length), (2, layout.key_length))
        )
        both = launches(
            query,
            key,
            value,
            layout,
            scale=int(size) ** -0.5,
            causal=True,
            window=256 if "window" in features else None,
            softcap=50.0 if "softcap" in features else None,
            sinks=torch.empty(8) if "sinks" in features else None,
        )
        for found in both[:2]:
            compiled = compile_launch(found)
            facts = {"name": text, "kernel": found.kernel.fn.__name__, "shared": compiled.metadata.shared}
            facts |= {"tile": found.tile} | inspect(compiled.asm["cubin"])
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
