"""Convert graphs to low precision without overflow on real images.

Before the conversion to fp16, the largest magnitude of each tensor is measured on the images of
verification. Operators that compute or use a tensor near the end of fp16's range stay in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import FleetTables
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.artefacts.verification import SOFTMAX
from aoft_deploy.errors import SettingError
from aoft_exporters.graph.emulation import emulated, left_in_float, low_results
from aoft_exporters.graph.low_precision import LARGEST_FP16, typed
from aoft_exporters.onnx.fp8 import in_fp8
from aoft_exporters.onnx.sessions import session

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
    if spec.precision == "fp8":
        return _with_fp8_layers(proto, spec, tables)
    low = typed(proto, spec.precision)
    if spec.precision == "fp16" and spec.judged is not None:
        pixels = spec.judged
        measured = magnitudes(low, lambda: _feeds(pixels, spec, tables))
        limit = LARGEST_FP16 / HEADROOM
        beyond = {name for name, largest in measured.items() if not largest <= limit}
        low = typed(proto, spec.precision, beyond) if beyond else low
    return low, left_in_float(low)


def _with_fp8_layers(
    proto: Any, spec: ExportSpec, tables: FleetTables | None
) -> tuple[Any, list[str]]:
    """Convert a graph to fp16 with its linear layers in FP8; see ``in_range``.

    Raises:
        SettingError: There are no calibration images.
    """
    if spec.calibration is None:
        raise SettingError("fp8 needs calibration images: give them with `calibrate`.")
    pixels, info = spec.calibration.pixels, ArtefactInfo(spec.metadata)
    low, left = in_range(proto, replace(spec, precision="fp16"), tables)
    largest = magnitudes(low, lambda: _feeds(pixels, spec, tables))
    classes = (
        [*info.tasks.values()]
        if info.is_fleet
        else [info.classes if "classes" in info.texts else SOFTMAX]
    )
    low, kept = in_fp8(
        low,
        largest,
        lambda: _samples(pixels, spec, tables),
        classes,
        spec.calibration.min_agreement,
    )
    return low, left + kept


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


def _feeds(
    pixels: NDArray[np.uint8], spec: ExportSpec, tables: FleetTables | None
) -> Iterable[Mapping[str, NDArray[Any]]]:
    """Batches of images; for a fleet, each batch once for every task."""
    for images in _batches(pixels, spec):
        if tables is None:
            yield {spec.input.name: images}
            continue
        for task in range(len(tables.count)):
            yield {spec.input.name: images, "task": np.full(len(images), task)}


def _samples(
    pixels: NDArray[np.uint8], spec: ExportSpec, tables: FleetTables | None
) -> Iterable[Mapping[str, NDArray[Any]]]:
    """Batches of images; for a fleet, the images have its tasks in turn."""
    first = 0
    for images in _batches(pixels, spec):
        feed: dict[str, NDArray[Any]] = {spec.input.name: images}
        if tables is not None:
            feed["task"] = np.arange(first, first + len(images)) % len(tables.count)
        first += len(images)
        yield feed


def _batches(pixels: NDArray[np.uint8], spec: ExportSpec) -> Iterable[NDArray[Any]]:
    """The graph's input for images, in batches."""
    for start in range(0, len(pixels), BATCH):
        yield spec.input.prepare(pixels[start : start + BATCH])
