"""How a safetensors file is written: the length of its header, the header (JSON), and the tensors one after another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PIECE_BYTES = 4 << 20
"""Bytes written at once: few enough to stay in the processor's cache, and for the watchdog to hear of each."""


def order_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return names in the order in which their tensors are written."""
    # Wide types first, as safetensors does, so that every tensor is aligned to its own element size.
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> tuple[bytes, dict[str, int]]:
    """Return what precedes the tensors in a file, and the place of each in it.

    Args:
        tensors: by name; their values are not read.
        metadata: of the file.

    Returns:
        The first bytes of the file, and name -> offset in bytes from its begin, in the order of writing.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    starts, end = dict[str, int](), 0
    for name in order_of(tensors):
        tensor = tensors[name]
        starts[name], end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on any device, in the order in which they are written."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
