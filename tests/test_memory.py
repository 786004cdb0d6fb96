"""Memory that glibc keeps for the next pass."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(), reason="pages of 2 MiB: few faults either way"
    ),
    pytest.mark.skipif(
        sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
    ),
]

PROGRAM = """
import ctypes, resource, sys
from rlhf_cli.memory import free_memory, keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def one_pass():
    blocks = [libc.malloc(20 << 20) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 20 << 20)
    for block in blocks:
        libc.free(block)

one_pass()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    one_pass()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
free_memory()
with open("/proc/self/statm") as file:
    print(int(file.read().split()[1]) * resource.getpagesize())
"""


def faults(how: str, **changes: str) -> tuple[int, int]:
    """Page faults of five passes that allocate 80 MB, and the resident bytes after `free_memory`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, env=environment | changes, capture_output=True, text=True, check=True)
    found, resident = map(int, done.stdout.split())
    return found, resident


def test_the_next_pass_finds_the_pages_of_the_last_one():
    without, _ = faults("default")
    kept, resident = faults("keep")
    assert without > 5 * 15_000  # 20,000 pages a pass
    assert kept < 5_000
    assert resident < 60e6  # given back by `free_memory`


def test_what_a_user_set_stays():
    found, _ = faults("keep", MALLOC_MMAP_THRESHOLD_="1000000")
    assert found > 5 * 15_000


RETURNED = """
import ctypes, resource, sys
from rlhf_cli.memory import return_freed_memory
if sys.argv[1] == "return":
    return_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.free(libc.malloc(30 << 20))  # by default, glibc then takes blocks of up to this size from its heap
blocks = [libc.malloc(200 << 10) for _ in range(1000)]
pin = libc.malloc(1000)  # small blocks behind them
for block in blocks:
    ctypes.memset(block, 1, 200 << 10)
    libc.free(block)
with open("/proc/self/statm") as file:
    print(int(file.read().split()[1]) * resource.getpagesize())
"""


def test_a_sharded_run_gives_back_what_it_frees_behind_blocks_that_it_uses():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    default, returned = (
        int(subprocess.run([sys.executable, "-c", RETURNED, how], env=environment, capture_output=True, text=True,
                           check=True).stdout)
        for how in ("default", "return")
    )  # fmt: skip
    assert default - returned > 150e6
