"""Checks of `rlhf doctor`: what is missing or wrong, and the command that fixes it. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_cli.distributed.ranks import check_launcher_environment
from rlhf_cli.errors import UsageError

LEAST_MEMORY = 1_500_000_000
"""Bytes that the quickstart needs."""
LEAST_DISK = 500_000_000
"""Bytes that the quickstart writes, and room for temporary files."""


@dataclass(frozen=True)
class Finding:
    """Something that is missing or wrong.

    Attributes:
        message: what, and what for.
        fix: a command, or what to do where no command does it.
        blocks: whether a normal run fails because of it.
    """

    message: str
    fix: str
    blocks: bool = False


_EXTRAS = (
    # module, extra, what for
    ("bitsandbytes", "quantized", "`optimizer: adamw-8bit` and `model.quantize`"),
    ("lm_eval", "tasks", "`evaluate.tasks`"),
    ("matplotlib", "plots", "pictures of curves"),
    ("starlette", "web", "`rlhf label --serve` and `rlhf watch --serve`"),
    ("choix", "merge", "merging the rankings of several annotators"),
    ("python_calamine", "xlsx", "data in Excel files"),
)


def missing_extras(*, has_gpu: bool) -> Iterator[Finding]:
    """Yield optional packages that are not installed, with the command that installs them."""
    names = {"lm_eval": "lm-eval", "python_calamine": "python-calamine"}
    for module, extra, use in _EXTRAS:
        if importlib.util.find_spec(module) is None:
            yield Finding(f"{names.get(module, module)} is not installed; it is for {use}", pip(f"'rlhf-cli[{extra}]'"))
    if has_gpu and importlib.util.find_spec("vllm") is None:
        folder = "~/.venvs/rlhf-vllm"
        yield Finding(
            "vllm is not installed; it samples faster (`generation.engine: vllm`), in an environment of its own",
            f"{sys.executable} -m venv {folder} && {folder}/bin/pip install 'rlhf-cli[vllm]'",
        )


def pip(what: str) -> str:
    """Return the command that installs something into the environment of this process."""
    if importlib.util.find_spec("pip") is None and shutil.which("uv") is not None:
        return f"uv pip install --python {sys.executable} {what}"
    return f"{sys.executable} -m pip install {what}"


def check_packages(found: Mapping[str, str], tested: Mapping[str, str]) -> Iterator[Finding]:
    """Yield required packages that are missing."""
    for name, version in tested.items():
        if found[name] == "not installed":
            yield Finding(f"{name} is not installed", pip(f"'{name}=={version}'"), blocks=True)


def check_space(memory: int, disk: int) -> Iterator[Finding]:
    """Yield too little memory or disk space, in bytes."""
    from rlhf_cli.pipeline.disk_space import format_bytes

    if memory < LEAST_MEMORY:
        yield Finding(
            f"{format_bytes(memory)} of memory are available, and the smallest run needs {format_bytes(LEAST_MEMORY)}",
            "close other programs, or raise the limit of the container: `docker run --memory 4g ...`",
            blocks=True,
        )
    if disk < LEAST_DISK:
        yield Finding(
            f"{format_bytes(disk)} are free on the disk of this folder, and the smallest run writes "
            f"{format_bytes(LEAST_DISK)}",
            "free some space: `du -sh runs/* | sort -h` lists the largest runs; or `--run-dir` on another disk",
            blocks=True,
        )


def too_many_threads(threads: int, cores: int, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield more threads than cores, which makes a CPU slow."""
    if threads > cores:
        fix = f"unset {name}" if (name := _limit(environment)) else f"--set model.threads={cores}"
        yield Finding(f"torch uses {threads} threads on {cores} cores, which slow each other down", fix)


def few_threads(threads: int, cores: int, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield a variable that leaves cores unused; for small models one thread is about as fast."""
    name = _limit(environment)
    if name is not None and threads < cores:
        yield Finding(f"{name}={environment[name]} limits torch to {threads} of {cores} cores", f"unset {name}")


def _limit(environment: Mapping[str, str]) -> str | None:
    return next((one for one in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if environment.get(one)), None)


def check_compiler(*, has_gpu: bool) -> Iterator[Finding]:
    """Yield a missing C compiler, without which Triton cannot compile its launcher on a GPU."""
    if not has_gpu or sys.platform != "linux":
        return
    if importlib.util.find_spec("triton") is None:
        yield Finding("triton is not installed; it is for the attention backend `triton`", pip("triton"))
    elif not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        manager = next((one for one in ("apt-get", "dnf", "apk") if shutil.which(one)), None)
        command = {
            "apt-get": "sudo apt-get install -y gcc",
            "dnf": "sudo dnf install -y gcc",
            "apk": "sudo apk add gcc",
        }
        yield Finding(
            "there is no C compiler, which Triton needs for the attention backend `triton`",
            command.get(manager or "", "install gcc, or set CC to a C compiler"),
        )


def check_browser() -> Iterator[Finding]:
    """Yield that no browser can be opened here, which is usual on a server."""
    import webbrowser

    try:
        webbrowser.get()
    except webbrowser.Error:
        yield Finding(
            "no browser can be opened here; pages of `rlhf label --serve` and `rlhf watch --serve` need one",
            f"on your own machine: ssh -L 8100:localhost:8100 -L 8200:localhost:8200 {_address()}",
        )


def _address() -> str:
    import socket

    return f"{os.environ.get('USER', 'you')}@{socket.gethostname()}"


def check_launcher(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield variables of a launcher that only half describe a launch."""
    try:
        check_launcher_environment(environment)
    except UsageError as error:
        yield Finding(error.message, error.hint or "", blocks=True)


def as_json(finding: Finding) -> dict[str, Any]:
    """Return a finding as plain data."""
    return {"message": finding.message, "fix": finding.fix, "blocks": finding.blocks}
