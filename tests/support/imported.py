"""Which heavy libraries a piece of code imports."""

from __future__ import annotations

import json
import subprocess
import sys

__all__ = ["heavy_libraries"]

HEAVY = (
    "accelerate gradio nncf numpy onnx onnxruntime onnxscript openvino PIL safetensors sklearn "
    "timm torch torchvision"
).split()


def heavy_libraries(code: str, *arguments: object) -> set[str]:
    """Run code in a fresh interpreter and return the heavy libraries that it has imported.

    Args:
        code: Python code; ``sys`` is imported.
        arguments: The interpreter's ``sys.argv[1:]``.
    """
    report = f"\nimport json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    command = [sys.executable, "-c", f"import sys\n{code}{report}", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))
