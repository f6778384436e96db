"""Large blocks of memory are returned to the system, or kept while an engine is opened."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

MEMORY = """
import sys
from pathlib import Path
from aoft_deploy.memory import return_large_blocks

def resident():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) // 1024

if sys.argv[1] == "set":
    return_large_blocks()
batch = b"x" * 2**23
del batch  # the largest block that was freed
before = resident()
bodies, small = [], []
for number in range(32):
    bodies.append(bytes([number]) * 2**21)
    small.append([object() for _ in range(100)])
    small.append(bytes([number]) * 5000)
del bodies
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_blocks_between_small_ones_are_returned_to_the_system() -> None:
    kept = {}
    for how in ("set", "not"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, how], capture_output=True, text=True, check=True
        )
        kept[how] = int(done.stdout)
    assert kept["set"] < 8 < 40 < kept["not"]  # of 64 MB


KEPT = """
import sys
from pathlib import Path
from aoft_deploy.memory import keep_large_blocks, keeping_large_blocks, return_large_blocks

def resident():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) // 1024

def freed():
    blocks = [bytes([number]) * (8 * 2**20 - 100) for number in range(8)]
    return len(blocks)

before, found = resident(), []
if sys.argv[1] == "for good":
    keep_large_blocks()
    freed()
    found = [resident() - before]
else:
    return_large_blocks()
    with keeping_large_blocks():
        freed()
        found.append(resident() - before)
    found.append(resident() - before)
    freed()
    found.append(resident() - before)
print(*found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_are_kept_as_long_as_they_shall_be() -> None:
    kept = {}
    for how in ("for good", "meanwhile"):
        command = [sys.executable, "-c", KEPT, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        kept[how] = list(map(int, done.stdout.split()))
    assert kept["for good"][0] > 50  # of 64 MB
    meanwhile, then, later = kept["meanwhile"]
    assert meanwhile > 50 and max(then, later) < 8
