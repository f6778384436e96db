"""A GPU's name and free memory, from a driver that the test compiles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "support" / "driver_on_host.c"

CODE = """
import ctypes, sys
from aoft_deploy.errors import SettingError
from aoft_exporters.onnx.cuda_driver import free_memory, gpu_name
for index in map(int, sys.argv[1:]):
    print(gpu_name(index))
    try:
        print(free_memory(index))
    except SettingError as error:
        print(error)
try:
    print(ctypes.CDLL("libcuda.so.1").host_held())
except OSError:
    pass
"""


def printed(folder: Path, *indices: int) -> list[str]:
    """Lines of a process with the driver in this folder."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, "-W", "error", "-c", CODE, *map(str, indices)]
    ended = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
    assert ended.stderr == ""
    return ended.stdout.splitlines()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to compile a driver")
def test_name_and_free_memory_are_those_of_the_gpu_asked_for(tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", SOURCE, "-o", library], check=True)
    *names, held = printed(tmp_path, 0, 1, 2)
    assert names[::2] == ["GPU 0 of the host", "GPU 1 of the host", "None"]
    assert (int(names[1]), int(names[3]), int(held)) == (10 * 2**32, 11 * 2**32, 0)
    assert names[5] == (
        "The free memory of GPU 2 is not known (CUDA driver error 101): give a `budget`."
    )


def test_without_a_driver_a_budget_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    name, line = printed(tmp_path, 0)
    assert name == "None"
    assert line.startswith("The free memory of GPU 0 is not known (")
    assert line.endswith("libcuda.so.1: file too short): give a `budget`.")
