"""Which sources of the kernels have passed every default case, so that the same sources need not be run whole again.

The values and the machine code of a kernel depend on its sources, on the cases, and on the versions of Triton and
torch. `verified.json` has a digest of them, written by `make verify-kernels` after all cases have passed. While the
digest is the same, one case in five is run; after any change all are.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
RECORD = Path(__file__).with_name("verified.json")
ONE_IN = 5
_SOURCES = ("rlhf_cli/attention", "tests/attention/kernels")
_PACKAGES = ("triton", "torch")


def digest() -> str:
    """Return the digest of the sources and of the versions."""
    found = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    for package in _PACKAGES:
        found.update(f"{package} {importlib.metadata.version(package).split('+')[0]}\n".encode())
    return found.hexdigest()


def runs_all() -> bool:
    """Whether every case is asked for, beyond those of the default."""
    return os.environ.get("RLHF_ALL_KERNEL_CASES") == "1"


def is_verified() -> bool:
    """Whether these very sources passed the default cases with these versions."""
    if os.environ.get("RLHF_VERIFY_KERNELS") == "1" or not RECORD.is_file():
        return False
    return json.loads(RECORD.read_text(encoding="utf-8"))["digest"] == digest()


def sample(cases: list[str]) -> list[str]:
    """Return all cases, or one in five where all have passed before."""
    return cases[::ONE_IN] if is_verified() and not runs_all() else cases


if __name__ == "__main__":
    RECORD.write_text(json.dumps({"digest": digest()}, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {RECORD}\n")
