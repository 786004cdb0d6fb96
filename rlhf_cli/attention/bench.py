"""Benchmark attention backends for speed and memory against torch's `scaled_dot_product_attention`.

Operations: 4 Lq Lk D H per forward pass (two matrix products of 2 Lq Lk D per head), half of that if causal, and 2.5
times as many per backward pass (five products). Softmax is not counted. Decoding is limited by memory bandwidth, so it
is reported in bytes: keys and values read once, plus queries and outputs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf_cli.attention import registry
from rlhf_cli.attention.contract import Request
from rlhf_cli.attention.layout import Layout
from rlhf_cli.attention.timing import Run, backward_run, machine_info, medians, peak_bytes
from rlhf_cli.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The backward pass computes five matrix products, the forward pass two of the same size.
BACKWARD_FACTOR = 2.5
_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Shape:
    """Shape of a benchmark: causal self-attention of whole sequences, or decoding with one query per sequence.

    Attributes:
        batch, heads, key_heads, length, head_size: B, H, G, L (keys, and queries unless decoding) and D.
        is_decoding: one query per sequence over L cached keys.
    """

    batch: int
    heads: int
    key_heads: int
    length: int
    head_size: int
    is_decoding: bool = False

    @staticmethod
    def parse(text: str) -> Shape:
        """Parse `[decode:]BxHxLxD`, where H may be `H/G` for G key heads.

        Raises:
            UsageError: the text has another format.
        """
        mode, _, sizes = text.rpartition(":")
        try:
            batch, heads, length, head_size = sizes.split("x")
            queries, _, keys = heads.partition("/")
            numbers = [int(size) for size in (batch, queries, keys or queries, length, head_size)]
            is_valid = mode in ("", "dense", "decode") and min(numbers) > 0 and numbers[1] % numbers[2] == 0
        except ValueError:
            is_valid, numbers = False, []
        if not is_valid:
            raise UsageError(
                f"invalid shape `{text}`",
                hint="use batch x heads x tokens x head size: 4x32x2048x128; 4x32/8x2048x128 for eight key heads; "
                "decode:8x32/8x4096x128 for one query over 4096 keys",
            )
        return Shape(*numbers, is_decoding=mode == "decode")

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.key_heads else f"{self.heads}/{self.key_heads}"
        return f"{'decode:' * self.is_decoding}{self.batch}x{heads}x{self.length}x{self.head_size}"

    @property
    def queries(self) -> int:
        """Lq."""
        return 1 if self.is_decoding else self.length

    @property
    def flops(self) -> float:
        """Floating-point operations of a forward pass."""
        return forward_flops(self.batch, self.heads, self.queries, self.length, self.head_size, not self.is_decoding)

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes that a forward pass reads and writes at least."""
        rows = 2 * self.heads * self.queries + 2 * self.key_heads * self.length
        return self.batch * rows * self.head_size * dtype.itemsize

    def tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Draw query, key and value with seed 0; they require gradients unless decoding."""
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(self.batch, heads, length, self.head_size, generator=generator).to(device, dtype)
            for heads, length in ((self.heads, self.queries), *[(self.key_heads, self.length)] * 2)
        )
        for tensor in (query, key, value):
            tensor.requires_grad_(not self.is_decoding)
        return query, key, value


SHAPES = {
    "cpu": ("1x8x256x64", "1x8x1024x64", "decode:8x8x1024x64"),
    "cuda": (
        "8x16x512x64",
        "2x16x2048x64",
        "1x16x8192x64",
        "8x16x512x128",
        "2x16x2048x128",
        "1x16x8192x128",
        "decode:64x32/8x4096x128",
    ),
}


def forward_flops(batch: int, heads: int, queries: int, keys: int, head_size: int, causal: bool) -> float:
    """Return 4 Lq Lk D H B, half of it if causal."""
    return 4.0 * batch * heads * queries * keys * head_size / (2 if causal else 1)


def measure(
    shapes: list[Shape],
    *,
    backends: list[str],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Measure time, speed and memory of backends and of all of torch's kernels, for every shape.

    Args:
        shapes: the shapes to measure.
        backends: names as in `model.attention`; empty: all built-in backends available here.
        device: where to run.
        dtype: of the tensors.
        seconds: approximate time per shape; default: 3.

    Raises:
        UsageError: a backend is unknown or unavailable here.
    """
    if not backends:
        backends = [name for name, backend in registry.built_in().items() if backend.missing() is None]
    elif absent := [(name, reason) for name in backends if (reason := registry.find(name).missing()) is not None]:
        raise UsageError(f"attention backend `{absent[0][0]}`: {absent[0][1]}")
    seconds = seconds or 3.0
    found = [_measure_shape(shape, backends, device, dtype, seconds) for shape in shapes]
    return {**machine_info(device), "dtype": str(dtype).removeprefix("torch."), "shapes": found}


def _measure_shape(
    shape: Shape, backends: list[str], device: torch.device, dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    query, key, value = shape.tensors(device, dtype)
    causal = not shape.is_decoding
    forwards, refused = sdpa_runs(query, key, value, causal=causal)
    available = list(forwards)
    forwards = {f"sdpa {name}": run for name, run in forwards.items()}
    layout = Layout.dense(shape.batch, shape.queries, shape.length)
    for name in backends:
        no_rules: dict[str, Any] = {"window": None, "softcap": None, "sinks": None, "bias": None}
        request = Request.of(query, key, value, layout, causal=causal, **no_rules)
        if name != registry.AUTO and (reason := registry.find(name).unsupported(request)) is not None:
            refused[name] = reason
        else:
            forwards[name] = _attend(name, query, key, value, layout, causal)
    for name in [name for name in forwards if name in _HOLDS_ALL_SCORES]:
        if (needed := _score_bytes(shape)) > (free := free_bytes(device)) / 2:
            del forwards[name]
            refused[name] = f"its scores need {needed / 2**30:.1f} GiB, with {free / 2**30:.1f} GiB free"
    runs = {(name, "forward"): run for name, run in forwards.items()}
    if not shape.is_decoding:
        runs |= {(name, "backward"): backward_run(run, query, key, value) for name, run in forwards.items()}
    times = medians(runs, device, seconds=seconds)
    memory = {name: peak_bytes(run, device) for name, run in forwards.items()}
    rows = [
        _row(name, shape, dtype, times[name, "forward"], times.get((name, "backward")), memory[name])
        for name in forwards
    ]
    return {
        "shape": str(shape),
        "sdpa_choice": sdpa_choice(query, key, value, causal=causal),
        "sdpa_available": available,
        "refused": refused,
        "rows": rows,
    }


# These keep scores, weights and the gradients of both in float32.
_HOLDS_ALL_SCORES = ("reference", "sdpa math")


def _score_bytes(shape: Shape) -> int:
    return 4 * 4 * shape.batch * shape.heads * shape.queries * shape.length


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # a dependency of accelerate

    return psutil.virtual_memory().available


def _attend(name: str, query: Tensor, key: Tensor, value: Tensor, layout: Layout, causal: bool) -> Run:
    def run() -> Tensor:
        return registry.attention(query, key, value, layout, causal=causal, backend=name).output

    return run


def _row(
    name: str, shape: Shape, dtype: torch.dtype, forward: float, backward: float | None, memory: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"backend": name, "forward_ms": 1e3 * forward, "memory_bytes": memory}
    if backward is None:
        return row | {"gb_per_s": shape.bytes(dtype) / forward / 1e9}
    row |= {"backward_ms": 1e3 * backward, "forward_tflops": shape.flops / forward / 1e12}
    return row | {"backward_tflops": BACKWARD_FACTOR * shape.flops / backward / 1e12}


def sdpa_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    without: tuple[str, ...] = (),
) -> tuple[dict[str, Run], dict[str, str]]:
    """Prepare a run of `scaled_dot_product_attention` per kernel that supports these tensors.

    Args:
        query: (B, H, Lq, D).
        key: (B, G, Lk, D).
        value: (B, G, Lk, D).
        causal: as in `scaled_dot_product_attention`.
        mask: `attn_mask` of `scaled_dot_product_attention`.
        without: names of kernels to skip.

    Returns:
        A run per supported kernel, and the reason per unsupported kernel.
    """
    runs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for name, kernel in _SDPA.items():
        if name in without:
            continue
        if query.device.type != "cuda" and name in ("cudnn", "efficient"):
            refused[f"sdpa {name}"] = "requires a CUDA device"
            continue
        run = _sdpa_run(kernel, query, key, value, causal, mask)
        try:
            with warnings.catch_warnings(action="ignore"):  # they repeat the reasons of the error
                run()
        except RuntimeError as error:  # raised by torch if a kernel does not support the call
            refused[f"sdpa {name}"] = str(error).splitlines()[0]
        else:
            runs[name] = run
    return runs, refused


def _sdpa_run(kernel: SDPBackend, query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None) -> Run:
    grouped = query.shape[1] != key.shape[1]

    def run() -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped
            )

    return run


def sdpa_choice(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, mask: Tensor | None = None) -> str:
    """Return the kernel that torch chooses by default."""
    grouped = query.shape[1] != key.shape[1]
    ask: Any = getattr(torch, "_fused_sdp_choice")  # noqa: B009  (used by sdpa itself, not exported)
    picked = SDPBackend(ask(query, key, value, mask, 0.0, causal, scale=None, enable_gqa=grouped))
    return next((name for name, kernel in _SDPA.items() if kernel == picked), picked.name.lower())
