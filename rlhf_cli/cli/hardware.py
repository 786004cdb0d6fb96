"""Versions and hardware of this machine. Imports torch; used by `rlhf doctor` only."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from rlhf_cli.distributed.launcher import cores
from rlhf_cli.distributed.ranks import check_launcher_environment
from rlhf_cli.errors import UsageError

_TESTED = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "accelerate": "1.15.0"}
"""Versions in constraints.txt; a test keeps both equal."""


def examine() -> dict[str, Any]:
    """Collect everything `rlhf doctor` reports, as plain data; sizes in bytes."""
    from rlhf_cli.pipeline.manifest import versions

    found = versions()
    problems = [f"{name} is not installed" for name in _TESTED if found[name] == "not installed"]
    report: dict[str, Any] = {
        "versions": found,
        "tested": _TESTED,
        "platform": platform.platform(),
        "cpus": cores(),
        "memory_bytes": _memory(),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
    }
    if found["torch"] != "not installed":
        try:
            report |= _torch()
            problems += _unused_gpu()
        except (ImportError, OSError) as error:  # wheels for another CUDA or libc version fail here
            problems.append(f"cannot import torch: {error}")
    try:
        check_launcher_environment(os.environ)
    except UsageError as error:
        problems.append(f"{error.message}; {error.hint}")
    return report | {"problems": problems}


def _unused_gpu() -> list[str]:
    from rlhf_cli.models.gpu_check import unused_gpu

    found = unused_gpu()
    return [] if found is None else [f"{found.reason}; {found.fix}"]


def _memory() -> int:
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import psutil  # a dependency of accelerate

    return psutil.virtual_memory().total


def _torch() -> dict[str, Any]:
    import torch

    from rlhf_cli.models.loading import resolve_device
    from rlhf_cli.models.precision_trial import has_bfloat16

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "threads": torch.get_num_threads(),
        "device": str(resolve_device("auto")),
        "cuda": torch.version.cuda,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "mps": torch.backends.mps.is_available(),
        "cpu_bfloat16": has_bfloat16(torch.device("cpu")),
    }


def print_report(found: dict[str, Any]) -> None:
    """Print the report as text to stdout."""
    from rlhf_cli.pipeline.disk_space import format_bytes

    rows = [("rlhf", found["versions"]["rlhf"]), ("python", f"{found['versions']['python']} on {found['platform']}")]
    for name, tested in _TESTED.items():
        version = found["versions"][name]
        rows.append((name, version if version.split("+")[0] == tested else f"{version} (tested with {tested})"))
    if "device" in found:
        bf16 = "native bfloat16" if found["cpu_bfloat16"] else "no native bfloat16"
        rows.append(("cpu", f"{found['cpus']} cores, {found['threads']} threads, {bf16}"))
        gpus = ", ".join(f"{gpu['name']} with {format_bytes(gpu['memory_bytes'])}" for gpu in found["gpus"])
        rows.append(("gpu", gpus or ("Apple MPS" if found["mps"] else "none")))
        rows.append(("auto", f"device {found['device']}; `model.precision` is measured when a stage starts"))
    rows.append(("memory", format_bytes(found["memory_bytes"])))
    rows.append(("disk", f"{format_bytes(found['disk_free_bytes'])} free here"))
    print("\n".join(f"{name:<13} {value}" for name, value in rows))
    print("\n".join(f"problem: {problem}" for problem in found["problems"]) or "no problems found")
