"""Import what most tests need, and let the ONNX exporter build its table of operators only once.

PyTorch parses the source of its 500 translations of operators for every export, a third of the time
of a small model's. The table depends on the opset alone.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

__all__ = ["keep_operator_table", "trace_once"]

_REGISTRATION = "torch.onnx._internal.exporter._registration"


def keep_operator_table() -> None:
    """Make every later export of this process use the first one's table."""
    registry: Any = importlib.import_module(_REGISTRATION).ONNXRegistry
    if not hasattr(registry.from_torchlib, "cache_info"):
        registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))


def trace_once() -> None:
    """Trace a small model, so that this process has imported what a trace needs."""
    from aoft_exporters.graph.tracing import trace

    keep_operator_table()
    trace(torch.nn.Linear(2, 2).eval(), {"pixel_values": (torch.zeros(3, 2), "batch")})
