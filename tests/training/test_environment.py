"""What a run sets in its process."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource, sys
import torch
from aoft_deploy.training.environment import keep_freed_memory

if sys.argv[1] == "keeps":
    keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 20) for _ in range(40)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(), faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.skipif(not Path("/proc").exists(), reason="Linux")
def test_the_next_step_gets_the_memory_that_the_last_one_freed() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", CODE, mode]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    assert faults("keeps") < faults("returns") / 10
