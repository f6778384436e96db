"""Convert graphs to low precision without overflow on real images.

Before the conversion to fp16, the largest magnitude of each tensor is measured on the images of
verification. Operators that compute or use a tensor near the end of fp16's range stay in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.engine import FleetTables
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_exporters.graph.emulation import emulated, left_in_float, low_results
from aoft_exporters.graph.low_precision import LARGEST_FP16, typed
from aoft_exporters.onnx.engine import session

__all__ = ["HEADROOM", "in_range", "magnitudes"]

HEADROOM = 4
"""Factor between the largest measured magnitude and the end of fp16's range."""

BATCH = 8


def in_range(
    proto: Any, spec: ExportSpec, tables: FleetTables | None = None
) -> tuple[Any, list[str]]:
    """Convert a graph to the spec's low precision.

    Args:
        proto: An ONNX model in float32; a fleet's has its tables as initialisers.
        spec: Precision, and the images to measure on. Without images, nothing is measured.
        tables: The fleet's tables; None for a single model.

    Returns:
        The converted graph, and its products that stay in float32; see ``left_in_float``. In
        ``tf32``, the graph itself, which stays in float32, and no products.
    """
    if spec.precision == "tf32":
        return proto, []
    low = typed(proto, spec.precision)
    if spec.precision == "fp16" and spec.judged is not None:
        measured = magnitudes(low, lambda: _feeds(spec, tables))
        limit = LARGEST_FP16 / HEADROOM
        beyond = {name for name, largest in measured.items() if not largest <= limit}
        low = typed(proto, spec.precision, beyond) if beyond else low
    return low, left_in_float(low)


def magnitudes(low: Any, feeds: Callable[[], Iterable[Mapping[str, Any]]]) -> dict[str, float]:
    """Largest magnitude of every low-precision tensor, computed in float32.

    Args:
        low: A graph of ``typed``.
        feeds: Returns the inputs to measure on.

    Returns:
        Magnitudes by the tensors' names in the float32 graph; nan if any value is nan.
    """
    import onnx

    proto = emulated(low, rounded=False)
    results = low_results(low)
    del proto.graph.output[:]
    for i, name in enumerate(results):
        nodes = [
            onnx.helper.make_node("Abs", [name], [f"magnitude.{i}"]),
            onnx.helper.make_node("ReduceMax", [f"magnitude.{i}"], [f"largest.{i}"], keepdims=0),
        ]
        proto.graph.node.extend(nodes)
        value = onnx.helper.make_tensor_value_info(f"largest.{i}", onnx.TensorProto.FLOAT, [])
        proto.graph.output.append(value)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.onnx"
        onnx.save(proto, path)
        del proto  # the session has its own copy of the weights
        running = session(path, None, "cpu", path)
    largest = np.zeros(len(results))
    for feed in feeds():
        largest = np.maximum(largest, np.array(running.run(None, dict(feed)), np.float64))
    found: dict[str, float] = {}
    for name, most in zip(results.values(), largest.tolist(), strict=True):
        found[name] = max(found.get(name, 0.0), most) if most == most else most
    return found


def _feeds(spec: ExportSpec, tables: FleetTables | None) -> Iterable[Mapping[str, NDArray[Any]]]:
    """Batches of the images; for a fleet, each batch once for every task."""
    assert spec.judged is not None
    for start in range(0, len(spec.judged), BATCH):
        pixels = spec.judged[start : start + BATCH]
        images = spec.input.prepare(pixels)
        if tables is None:
            yield {spec.input.name: images}
            continue
        for task in range(len(tables.count)):
            yield {spec.input.name: images, "task": np.full(len(images), task)}
