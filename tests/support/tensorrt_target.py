"""The GPU that tests build TensorRT engines for, and why tests on a GPU are skipped."""

from __future__ import annotations

import pytest

from aoft_deploy.errors import AoftError
from aoft_exporters.tensorrt import library


def why_no_engine_runs() -> str | None:
    """Why no engine can be built for this machine's GPU and run on it; None if one can."""
    if library.find_gpu() is None:
        return "needs a CUDA device"
    try:
        library.target(None)
    except AoftError as error:  # TensorRT-RTX refuses an H100
        return str(error)
    return None


GPU = library.find_gpu()
REASON = why_no_engine_runs()

CAPABILITY = "8.9" if REASON else None
"""``compute_capability`` to build for; None where this machine's GPU runs the engine."""

DEVICE_NAME = GPU.name if GPU and not REASON else None
"""Name of the GPU that runs the engines, or None."""

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=REASON or "")]
"""Marks of tests that run an engine."""
