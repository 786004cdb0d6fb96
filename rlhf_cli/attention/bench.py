"""How fast attention backends are and what memory they take, against the best that torch's own attention offers.

Operations: 4 Lq Lk D H a forward pass (two products of 2 Lq Lk D each), half of that where causal, and 2.5 times as
many backward (five products). Softmax is not counted. Decoding is bound by memory instead: bytes are keys and values
read once, with queries and outputs.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf_cli.attention import registry
from rlhf_cli.attention.contract import Request
from rlhf_cli.attention.layout import Layout
from rlhf_cli.errors import UsageError

Run = Callable[[], Any]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Backward passes compute five products of the size of which forward passes compute two.
BACKWARD_FACTOR = 2.5
_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Larger than any GPU's L2 cache, which holds 50 MB on Hopper and 126 MB on Blackwell.
_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Shape:
    """What to measure: causal self-attention of whole sequences, or one query a sequence over cached keys.

    Attributes:
        batch, heads, key_heads, length, head_size: B, H, G, L (keys; as many queries unless decoding) and D.
        is_decoding: one query a sequence.
    """

    batch: int
    heads: int
    key_heads: int
    length: int
    head_size: int
    is_decoding: bool = False

    @staticmethod
    def parse(text: str) -> Shape:
        """From `[decode:]BxHxLxD`, H being `H/G` where there are fewer key heads.

        Raises:
            UsageError: it is written otherwise.
        """
        kind, _, sizes = text.rpartition(":")
        try:
            batch, heads, length, head_size = sizes.split("x")
            queries, _, keys = heads.partition("/")
            numbers = [int(size) for size in (batch, queries, keys or queries, length, head_size)]
            is_valid = kind in ("", "dense", "decode") and min(numbers) > 0 and numbers[1] % numbers[2] == 0
        except ValueError:
            is_valid, numbers = False, []
        if not is_valid:
            raise UsageError(
                f"`{text}` is no shape",
                hint="write batch x heads x tokens x head size, as in 4x32x2048x128; 32/8 for eight key heads; "
                "decode:8x32/8x4096x128 for one query over 4096 keys",
            )
        return Shape(*numbers, is_decoding=kind == "decode")

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.key_heads else f"{self.heads}/{self.key_heads}"
        return f"{'decode:' * self.is_decoding}{self.batch}x{heads}x{self.length}x{self.head_size}"

    @property
    def queries(self) -> int:
        """Lq."""
        return 1 if self.is_decoding else self.length

    @property
    def flops(self) -> float:
        """Operations of a forward pass."""
        return forward_flops(self.batch, self.heads, self.queries, self.length, self.head_size, not self.is_decoding)

    def bytes(self, dtype: torch.dtype) -> int:
        """What a forward pass must read and write at least."""
        rows = 2 * self.heads * self.queries + 2 * self.key_heads * self.length
        return self.batch * rows * self.head_size * dtype.itemsize

    def tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, drawn with seed 0; they take gradients unless decoding."""
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
    """4 Lq Lk D H B, half of it where causal."""
    return 4.0 * batch * heads * queries * keys * head_size / (2 if causal else 1)


def measure(
    shapes: list[Shape],
    *,
    backends: list[str],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Time, speed and memory of backends and of all torch offers, for every shape.

    Args:
        shapes: what to measure.
        backends: names as `model.attention` takes them; empty for all built-in ones that run here.
        device: where.
        dtype: of the tensors.
        seconds: to spend on each shape, about; None is 3.

    Raises:
        UsageError: a named backend does not exist or does not run here.
    """
    if not backends:
        backends = [name for name, backend in registry.built_in().items() if backend.missing() is None]
    elif absent := [(name, reason) for name in backends if (reason := registry.find(name).missing()) is not None]:
        raise UsageError(f"attention backend `{absent[0][0]}`: {absent[0][1]}")
    seconds = seconds or 3.0
    found = [_measure_shape(shape, backends, device, dtype, seconds) for shape in shapes]
    return {**machine(device), "dtype": str(dtype).removeprefix("torch."), "shapes": found}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    try:
        import triton
    except ImportError:
        triton = None
    is_cuda = device.type == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if is_cuda else _processor(),
        "threads": None if is_cuda else torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": None if triton is None else triton.__version__,
        "cuda": torch.version.cuda if is_cuda else None,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:  # noqa: PTH123
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    except OSError:
        return "CPU"


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
        if (needed := _score_bytes(shape)) > (room := _free_bytes(device)) / 2:
            del forwards[name]
            refused[name] = f"its scores take {needed / 2**30:.1f} GiB of {room / 2**30:.1f} free"
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
        "sdpa_picks": sdpa_choice(query, key, value, causal=causal),
        "sdpa_available": available,
        "refused": refused,
        "rows": rows,
    }


# The equation in float32 keeps scores, weights and their gradients.
_HOLDS_ALL_SCORES = ("reference", "sdpa math")


def _score_bytes(shape: Shape) -> int:
    return 4 * 4 * shape.batch * shape.heads * shape.queries * shape.length


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _attend(name: str, query: Tensor, key: Tensor, value: Tensor, layout: Layout, causal: bool) -> Run:
    def run() -> Tensor:
        return registry.attention(query, key, value, layout, causal=causal, backend=name).output

    return run


def backward_run(forward: Run, *inputs: Tensor) -> Run:
    """The backward pass alone of a forward pass that runs now, once."""
    output = forward()
    upstream = torch.randn_like(output)

    def run() -> Any:
        return torch.autograd.grad(output, inputs, upstream, retain_graph=True)

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
    """Torch's `scaled_dot_product_attention` on every kernel of its that takes these tensors, `without` some.

    Returns:
        One run for each kernel, and of the others why not.
    """
    runs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for name, kernel in _SDPA.items():
        if name in without:
            continue
        if query.device.type != "cuda" and name in ("cudnn", "efficient"):
            refused[f"sdpa {name}"] = "it runs on CUDA devices"
            continue
        run = _sdpa_run(kernel, query, key, value, causal, mask)
        try:
            with warnings.catch_warnings(action="ignore"):  # the reasons, of which the error is the sum
                run()
        except RuntimeError as error:  # what torch raises where a kernel does not take a call
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
    """Which of its kernels torch picks when nobody tells it."""
    grouped = query.shape[1] != key.shape[1]
    ask: Any = getattr(torch, "_fused_sdp_choice")  # noqa: B009  (what sdpa itself asks, in no list of exports)
    picked = SDPBackend(ask(query, key, value, mask, 0.0, causal, scale=None, enable_gqa=grouped))
    return next((name for name, kernel in _SDPA.items() if kernel == picked), picked.name.lower())


def medians(
    runs: dict[Any, Run], device: torch.device, *, seconds: float, most: int = 100, is_cold: bool = True
) -> dict[Any, float]:
    """Median seconds of each run; runs take turns, so that a change of clock or load meets all of them.

    Args:
        runs: what to time, at least once each after two runs to warm up.
        device: where they run.
        seconds: to spend in all, about.
        most: rounds at most.
        is_cold: empty the GPU's L2 cache before every run.
    """
    # Cleared by a kernel, not freed: the allocator would give the same memory back anyhow.
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" and is_cold else None
    for run in runs.values():
        run()
    began = time.perf_counter()
    for run in runs.values():
        _timed(run, device, flush)
    rounds = min(most, max(1, int(seconds / max(time.perf_counter() - began, 1e-9))))
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_timed(run, device, flush))
    return {name: statistics.median(each) for name, each in times.items()}


def _timed(run: Run, device: torch.device, flush: Tensor | None) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        flush.zero_()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def peak_bytes(run: Run, device: torch.device) -> int:
    """Most memory that torch's allocator held at once during a run, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _cpu_allocations() as allocations:
        run()
    held = peak = 0
    for size in allocations:
        held += size
        peak = max(peak, held)
    return peak


@contextmanager
def _cpu_allocations() -> Iterator[list[int]]:
    """Bytes that torch's CPU allocator gives (and takes back, as negative numbers), in order of time."""
    found: list[int] = []
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes when it starts and stops to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    results: Any = profile.profiler and profile.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    found.extend(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))


def as_table(found: dict[str, Any]) -> str:
    """For people, 80 columns wide."""
    versions = [f"torch {found['torch']}", f"triton {found['triton']}" if found["triton"] else "no triton"]
    versions += [f"CUDA {found['cuda']}"] if found["cuda"] else [f"{found['threads']} thread(s)"]
    lines = [f"{found['device']}, {found['dtype']}", ", ".join(versions)]
    reasons: dict[str, str] = {}
    for shape in found["shapes"]:
        lines += ["", *_shape_lines(shape)]
        reasons |= shape["refused"]
    lines += ["", "x torch: speed as a multiple of the fastest sdpa kernel's."]
    lines += ["TFLOP/s: 4 Lq Lk D H / 2 operations forward (causal), 2.5 times that backward."]
    lines += ["MiB: most memory beyond the inputs, forward."]
    if reasons:
        lines += ["", *(_short(f"not measured: {name}: {reason}") for name, reason in reasons.items())]
    return "\n".join(lines)


def _shape_lines(shape: dict[str, Any]) -> Iterator[str]:
    is_decoding = "gb_per_s" in shape["rows"][0]
    what = "one query over cached keys" if is_decoding else "causal"
    yield f"{shape['shape']}, {what}"
    yield f"  torch's sdpa picks its kernel {shape['sdpa_picks']} of {', '.join(shape['sdpa_available'])}"
    if is_decoding:
        yield f"  {'':<15}{'ms':>9}{'GB/s':>9}{'x torch':>9}{'MiB':>10}"
    else:
        yield f"  {'':<15}{'------- forward -------':>25} {'------- backward ------':>25}"
        yield f"  {'':<15}{'ms':>9}{'TFLOP/s':>8}{'x torch':>8} {'ms':>9}{'TFLOP/s':>8}{'x torch':>8}{'MiB':>9}"
    forward, backward = (best_of_torch(shape, key) for key in ("forward_ms", "backward_ms"))
    for row in shape["rows"]:
        memory = row["memory_bytes"] / 2**20
        line = f"  {row['backend'][:14]:<15}{row['forward_ms']:>9.3f}"
        if is_decoding:
            yield f"{line}{row['gb_per_s']:>9.1f} {_share(forward, row['forward_ms'])}{memory:>10.2f}"
            continue
        line += f"{row['forward_tflops']:>8.3f}{_share(forward, row['forward_ms'])} {row['backward_ms']:>9.3f}"
        yield f"{line}{row['backward_tflops']:>8.3f}{_share(backward, row['backward_ms'])}{memory:>9.1f}"


def best_of_torch(shape: dict[str, Any], key: str) -> float | None:
    """The least time of torch's own kernels; None where there is none."""
    return min((row[key] for row in shape["rows"] if row["backend"].startswith("sdpa") and key in row), default=None)


def _share(best: float | None, mine: float) -> str:
    return f"{'' if best is None else f'{best / mine:.2f}':>8}"


def _short(line: str) -> str:
    return line if len(line) <= 79 else line[:76] + "..."


def plot(found: dict[str, Any], path: Any) -> None:
    """Bars of speed, a group for each shape, to a picture file.

    Raises:
        UsageError: matplotlib is not installed, or does not write this kind of file.
    """
    from rlhf_cli.attention.plots import pyplot

    figures = pyplot()
    panels = [
        (title, key, shapes)
        for title, key in (
            ("forward, TFLOP/s", "forward_tflops"),
            ("backward, TFLOP/s", "backward_tflops"),
            ("decoding, GB/s", "gb_per_s"),
        )
        if (shapes := [shape for shape in found["shapes"] if key in shape["rows"][0]])
    ]
    names = list(dict.fromkeys(row["backend"] for shape in found["shapes"] for row in shape["rows"]))
    height = 1.6 + 0.24 * max(sum(len(shape["rows"]) + 1 for shape in shapes) for *_, shapes in panels)
    figure, axes = figures.subplots(1, len(panels), figsize=(5.2 * len(panels), height), squeeze=False)
    for axis, (title, key, shapes) in zip(axes[0], panels, strict=True):
        _bars(axis, shapes, key, names)
        axis.set_title(title, loc="left", fontsize=10)
    figure.suptitle(f"{found['device']}, {found['dtype']}, torch {found['torch']}, {found['date']}", fontsize=9)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise UsageError(f"cannot write a plot to {path}: {error}", hint="end it in .png, .svg or .pdf") from error
    finally:
        figures.close(figure)


def _bars(axis: Any, shapes: list[dict[str, Any]], key: str, names: list[str]) -> None:
    at, ticks = 0.0, []
    for shape in shapes:
        start = at
        for row in shape["rows"]:
            axis.barh(at, row[key], 0.85, color=f"C{names.index(row['backend']) % 10}")
            axis.annotate(
                f"{row['backend']}  {row[key]:.3g}", (row[key], at), (4, 0), textcoords="offset points",
                va="center", fontsize=7,
            )  # fmt: skip
            at += 1
        ticks.append(((start + at - 1) / 2, shape["shape"]))
        at += 1
    axis.set_yticks([where for where, _ in ticks], [label for _, label in ticks], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(right=1.45 * max(row[key] for shape in shapes for row in shape["rows"]))
    axis.spines[["top", "right"]].set_visible(False)
