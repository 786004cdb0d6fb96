"""Build and load the C++ half of the fake device. Imports no torch, since the library is loaded before torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def missing() -> str | None:
    """Return why the library cannot be built here; None if it can."""
    if os.name != "posix":
        return "the fake CUDA device is built for Linux"
    if shutil.which("g++") is None:
        return "the fake CUDA device needs a C++ compiler: install g++"
    if "+cpu" not in (version := importlib.metadata.version("torch")):
        return f"torch {version} has a CUDA of its own; the fake device needs the CPU build"
    return None


def build() -> Path:
    """Compile the library for this torch, once per version of both; returns its path.

    Raises:
        RuntimeError: the compiler failed; the message holds what it said.
    """
    torch = _torch_folder()
    name = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"rlhf-fake-gpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{name}.so"
    if library.exists():
        return library
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    with tempfile.TemporaryDirectory(dir=folder) as own:
        made = Path(own) / library.name
        command = ["g++", "-shared", "-fPIC", "-std=c++20", "-w", str(SOURCE), "-o", str(made), *includes]
        command += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"g++ could not build {SOURCE.name}: {result.stderr[-2000:]}")
        made.replace(library)  # several test processes may build at once
    return library


def load(library: Path) -> ctypes.CDLL:
    """Load torch's core and the library into this process, which must not have imported torch yet."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library))


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent
