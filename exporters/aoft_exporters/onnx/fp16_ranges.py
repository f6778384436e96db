"""Low precision that real images do not overflow.

Before a graph is stated in fp16, its tensors are measured on the images it will be judged on. What
comes near the end of fp16's range stays in float32, with the operators that make or take it.
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
"""How much larger than on the images measured a result may become before it overflows."""

BATCH = 8


def in_range(
    proto: Any, spec: ExportSpec, tables: FleetTables | None = None
) -> tuple[Any, list[str]]:
    """The graph in the spec's low precision.

    Args:
        proto: An ONNX model in float32, of a fleet with its tables as initialisers.
        spec: Precision, and the images to measure on; without images nothing is measured.
        tables: The fleet's tables; None for a single model.

    Returns:
        The typed graph, and which of its products are in float32; see ``left_in_float``.
    """
    low = typed(proto, spec.precision)
    if spec.precision == "fp16" and spec.judged is not None:
        found = magnitudes(low, lambda: _feeds(spec, tables))
        beyond = {name for name, largest in found.items() if not largest <= LARGEST_FP16 / HEADROOM}
        low = typed(proto, spec.precision, beyond) if beyond else low
    return low, left_in_float(low)


def magnitudes(low: Any, feeds: Callable[[], Iterable[Mapping[str, Any]]]) -> dict[str, float]:
    """The largest magnitude of every tensor in low precision, computed in float32.

    Args:
        low: What ``typed`` returned.
        feeds: Gives the inputs to measure on.

    Returns:
        By the name that the tensor has in float32; nan where a value is.
    """
    import onnx

    proto = emulated(low, rounded=False)
    results = low_results(low)
    del proto.graph.output[:]
    for place, name in enumerate(results):
        made = [
            onnx.helper.make_node("Abs", [name], [f"magnitude.{place}"]),
            onnx.helper.make_node(
                "ReduceMax", [f"magnitude.{place}"], [f"largest.{place}"], keepdims=0
            ),
        ]
        proto.graph.node.extend(made)
        value = onnx.helper.make_tensor_value_info(f"largest.{place}", onnx.TensorProto.FLOAT, [])
        proto.graph.output.append(value)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.onnx"
        onnx.save(proto, path)
        del proto  # the session has weights of its own
        running = session(path, None, "cpu", path)
    largest = np.zeros(len(results))
    for feed in feeds():
        largest = np.maximum(largest, np.array(running.run(None, dict(feed)), np.float64))
    found: dict[str, float] = {}
    for name, most in zip(results.values(), largest.tolist(), strict=True):
        found[name] = max(found.get(name, 0.0), most) if most == most else most
    return found


def _feeds(spec: ExportSpec, tables: FleetTables | None) -> Iterable[Mapping[str, NDArray[Any]]]:
    """The images in batches, of a fleet for one task after the other."""
    assert spec.judged is not None
    for start in range(0, len(spec.judged), BATCH):
        pixels = spec.judged[start : start + BATCH]
        images = spec.input.prepare(pixels)
        if tables is None:
            yield {spec.input.name: images}
            continue
        for task in range(len(tables.count)):
            yield {spec.input.name: images, "task": np.full(len(images), task)}
