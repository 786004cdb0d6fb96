"""Versions and hardware of this machine, and what is wrong with them. Imports torch; used by `rlhf doctor` only."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.cli import machine_checks as checks
from rlhf_cli.cli.machine_checks import Finding
from rlhf_cli.distributed.launcher import cores
from rlhf_cli.memory import machine_memory

_TESTED = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "accelerate": "1.15.0"}
"""Versions in constraints.txt; a test keeps both equal."""


def examine() -> dict[str, Any]:
    """Collect everything `rlhf doctor` reports, as plain data; sizes in bytes.

    `problems` have a `message`, a `fix`, and whether they `block` a normal run; `optional` is what some settings need,
    or what may be faster.
    """
    from rlhf_cli.pipeline.manifest import versions

    found = versions()
    problems, optional = list(checks.check_packages(found, _TESTED)), list[Finding]()
    report: dict[str, Any] = {
        "versions": found,
        "tested": _TESTED,
        "platform": platform.platform(),
        "cpus": cores(),
        "memory_bytes": machine_memory(),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
    }
    if found["torch"] != "not installed":
        try:
            report |= _torch()
            problems += _unused_gpu()
            problems += checks.too_many_threads(report["threads"], report["cpus"], os.environ)
            optional += checks.few_threads(report["threads"], report["cpus"], os.environ)
        except (ImportError, OSError) as error:  # wheels for another CUDA or libc version fail here
            fix = checks.pip(f"--force-reinstall 'torch=={_TESTED['torch']}'")
            problems.append(Finding(f"cannot import torch: {error}", fix, blocks=True))
    problems += checks.check_space(report["memory_bytes"], report["disk_free_bytes"])
    problems += checks.check_launcher(os.environ)
    has_gpu = bool(report.get("gpus"))
    problems += checks.check_compiler(has_gpu=has_gpu)
    optional += [*checks.missing_extras(has_gpu=has_gpu), *checks.check_browser()]
    return report | {
        "problems": [checks.as_json(one) for one in problems],
        "optional": [checks.as_json(one) for one in optional],
    }


def _unused_gpu() -> Iterator[Finding]:
    from rlhf_cli.models.gpu_check import unused_gpu

    found = unused_gpu()
    if found is not None:
        yield Finding(found.reason, found.fix)


def _torch() -> dict[str, Any]:
    import torch

    from rlhf_cli.models.device import resolve_device
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
        rows.append(("auto", f"`model.device` is {found['device']}; `model.precision` is measured when a stage starts"))
    rows.append(("memory", format_bytes(found["memory_bytes"])))
    rows.append(("disk", f"{format_bytes(found['disk_free_bytes'])} free here"))
    print("\n".join(f"{name:<13} {value}" for name, value in rows))
    for name, heading in (("problems", "problem"), ("optional", "optional")):
        for one in found[name]:
            print(f"\n{_wrapped(heading + ': ' + one['message'])}\n    {one['fix']}")
    print("\nno problems found" if not found["problems"] else _conclusion(found["problems"]))


def _wrapped(text: str) -> str:
    """Wrap at words on a terminal; leave the line whole elsewhere, for programs that read lines."""
    if not sys.stdout.isatty():
        return text
    return textwrap.fill(text, shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)


def _conclusion(problems: list[dict[str, Any]]) -> str:
    count = sum(one["blocks"] for one in problems)
    return f"\n{count} of {len(problems)} problems stop a run" if count else "\nno problem stops a run"
