"""Import of OpenVINO."""

from __future__ import annotations

import subprocess
import sys

TOGETHER = """
import sys, threading
from aoft_exporters.openvino.library import openvino_library

openvino = openvino_library()
sys.setswitchinterval(1e-6)
barrier = threading.Barrier(4)

def use():
    barrier.wait()
    openvino.Type.f32.to_dtype()

threads = [threading.Thread(target=use, daemon=True) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(20)
print("alive" if any(thread.is_alive() for thread in threads) else "done", flush=True)
import os
os._exit(0)
"""


def test_the_first_uses_of_several_threads_do_not_block_each_other() -> None:
    for _ in range(4):  # without the cure, most of these processes hang, holding the GIL
        run = subprocess.run(
            [sys.executable, "-c", TOGETHER], timeout=120, capture_output=True, text=True
        )
        assert run.stdout == "done\n", run.stderr
