"""Measure time and peak memory on the CPU or a GPU, and describe the machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]

# Larger than the L2 cache of any GPU: 50 MB on Hopper, 126 MB on Blackwell.
_FLUSH_BYTES = 256 * 2**20


def machine_info(device: torch.device) -> dict[str, Any]:
    """Return the date, the device and the versions that results depend on."""
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


def backward_run(forward: Run, *inputs: Tensor) -> Run:
    """Run a forward pass once and return a function that runs only its backward pass, any number of times."""
    output = forward()
    upstream = torch.randn_like(output)

    def run() -> Any:
        return torch.autograd.grad(output, inputs, upstream, retain_graph=True)

    return run


def medians(
    runs: dict[Any, Run], device: torch.device, *, seconds: float, max_rounds: int = 100, flush_cache: bool = True
) -> dict[Any, float]:
    """Measure the median time of each run in seconds. Runs alternate, so that changes of clock or load affect all.

    Args:
        runs: functions to time; each is timed at least once after two warm-up calls.
        device: where they run.
        seconds: approximate total time.
        max_rounds: upper limit on calls per run, without warm-up.
        flush_cache: flush the L2 cache of a GPU before every call.
    """
    flush: Tensor | None = None
    if flush_cache and device.type == "cuda":
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    for run in runs.values():
        run()
    began = time.perf_counter()
    for run in runs.values():
        _timed(run, device, flush)
    rounds = min(max_rounds, max(1, int(seconds / max(time.perf_counter() - began, 1e-9))))
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
    """Measure the peak memory that torch's allocator holds during a run, in bytes above the level before the run."""
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
    """Record allocations (positive) and frees (negative) of torch's CPU allocator in bytes, in order of time."""
    found: list[int] = []
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's messages on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    results: Any = profile.profiler and profile.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    found.extend(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
