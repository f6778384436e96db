"""State the linear layers of an fp16 graph in FP8 (E4M3), in the form that TensorRT reads.

The input of a layer passes QuantizeLinear and DequantizeLinear, with one scale for the tensor that
is learned from calibration images. The weight is stored in FP8, with a scale for each output
channel. TensorRT computes such a product in FP8; other runtimes compute it in fp16 from the rounded
factors. The patch embedding, attention, the classifier and a fleet's own products are not in FP8.

A weight ``NAME`` becomes ``NAME_quantized``, float8e4m3fn (in, out), with ``NAME_scale`` for each
output channel. The scale of the layer's input is ``NAME_input_scale``. All scales are fp16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.classes import Classes
from aoft_exporters.graph.emulation import emulated, low_results
from aoft_exporters.onnx.sessions import session
from aoft_exporters.openvino.int8 import agreement

__all__ = ["LARGEST_FP8", "in_fp8", "linear_layers", "scale"]

LARGEST_FP8 = 448

SWITCHES = "fp8_layers"
"""Input of the graph that compares choices of layers: whether each layer is in FP8."""

RANKED = 8
"""Number of images on which the error of each layer is measured."""

Feeds = Callable[[], Iterable[Mapping[str, Any]]]


def in_fp8(
    low: Any,
    largest: Mapping[str, float],
    feeds: Feeds,
    classes: Sequence[Classes],
    min_agreement: float = 0.0,
) -> tuple[Any, list[str]]:
    """Convert the linear layers of a graph to FP8.

    If too few images keep their answers, the layers with the largest error stay in fp16.

    Args:
        low: An fp16 graph of ``typed``; it is not changed.
        largest: Largest magnitude of every low-precision tensor on the calibration images, by its
            name in the float32 graph.
        feeds: Returns the graph's inputs for the calibration images, in batches.
        classes: The classes of the tasks; images have these tasks in turn.
        min_agreement: Smallest allowed agreement with the fp16 graph; see
            ``Comparison.agreement``.

    Returns:
        A new ONNX model, and the names of the weights that stay in fp16 for accuracy.
    """
    names, layers = low_results(low), linear_layers(low)
    ranges = {weight: largest[names[layers[weight].input[0]]] for weight in layers}
    kept = _kept(low, ranges, feeds, classes, min_agreement) if min_agreement else []
    chosen = {weight: most for weight, most in ranges.items() if weight not in kept}
    return _converted(low, chosen), kept


def linear_layers(low: Any) -> dict[str, Any]:
    """The products of an fp16 graph with a matrix of weights, by the weight's name."""
    from onnx import TensorProto

    weights = {
        tensor.name
        for tensor in low.graph.initializer
        if tensor.data_type == TensorProto.FLOAT16 and len(tensor.dims) == 2
    }
    products = [node for node in low.graph.node if node.op_type == "MatMul"]
    return {node.input[1]: node for node in products if node.input[1] in weights}


def _kept(
    low: Any,
    ranges: Mapping[str, float],
    feeds: Feeds,
    classes: Sequence[Classes],
    min_agreement: float,
) -> list[str]:
    """Keep 0, 1, 2, 4, … layers in fp16, until the agreement is reached.

    Returns:
        Names of their weights. The list is empty if no number of layers suffices.
    """
    run = _switched(low, ranges, feeds)
    every = np.ones(len(ranges), bool)
    expected, names = run(~every), list(ranges)
    if agreement(run(every), expected, classes) >= min_agreement:
        return []
    finite = np.isfinite(expected[:RANKED])  # a fleet's tasks have different numbers of classes
    remaining_error = []  # if this layer alone is in fp16
    for i in range(len(names)):
        switches = every.copy()
        switches[i] = False
        difference = run(switches, RANKED)[finite] - expected[:RANKED][finite]
        remaining_error.append(float(np.square(difference).sum()))
    ranked = np.argsort(remaining_error, kind="stable")
    count = 1
    while count < 2 * len(ranked):
        switches = every.copy()
        switches[ranked[:count]] = False
        if agreement(run(switches), expected, classes) >= min_agreement:
            return sorted(names[i] for i in ranked[:count])
        count *= 2
    return []


def _switched(
    low: Any, ranges: Mapping[str, float], feeds: Feeds
) -> Callable[..., NDArray[np.float32]]:
    """Function from switches, bool (layers,), and a number of images to the emulated logits."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "switched.onnx"
        onnx.save(emulated(_converted(low, ranges, switched=True)), path)
        running = session(path, None, "cpu", path)

    def run(switches: NDArray[np.bool_], images: int | None = None) -> NDArray[np.float32]:
        logits, count = list[NDArray[np.float32]](), 0
        for feed in feeds():
            logits.append(running.run(None, {**feed, SWITCHES: switches})[0])
            count += len(logits[-1])
            if images is not None and count >= images:
                break
        return np.concatenate(logits)[:images]

    return run


def _converted(low: Any, ranges: Mapping[str, float], *, switched: bool = False) -> Any:
    """The graph with these layers in FP8.

    Args:
        low: An fp16 graph.
        ranges: Largest magnitude of the input of each layer, by its weight's name.
        switched: Add the input ``SWITCHES``, which chooses between FP8 and fp16 for each layer.
    """
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(low)
    graph, nodes = result.graph, list[Any]()
    stored = {tensor.name: tensor for tensor in graph.initializer}
    added = {"fp8_zero": _fp8(np.zeros(()))}
    if switched:
        kind = onnx.TensorProto.BOOL
        graph.input.append(onnx.helper.make_tensor_value_info(SWITCHES, kind, [len(ranges)]))
    for node in list(graph.node):
        weight = node.input[1] if node.op_type == "MatMul" else ""
        if weight in ranges:
            values = onnx.numpy_helper.to_array(stored[weight]).astype(np.float32)
            scales = scale(np.abs(values).max(axis=0))
            added[f"{weight}_quantized"] = _fp8(values / scales.astype(np.float32))
            added[f"{weight}_scale"] = scales
            added[f"{weight}_input_scale"] = scale(np.array(ranges[weight]))
            rounded = [f"{weight}/input", f"{weight}/weight"]
            nodes += _rounding(node.input[0], weight, rounded)
            if switched:
                index = list(ranges).index(weight)
                nodes += _switching(index, list(node.input), rounded, added)
            node.input[:] = rounded
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.initializer.extend(onnx.numpy_helper.from_array(v, name) for name, v in added.items())
    return result


def scale(largest: NDArray[Any]) -> NDArray[np.float16]:
    """Smallest fp16 scales at which values up to these magnitudes are within FP8's range."""
    exact = np.asarray(largest, np.float32) / LARGEST_FP8
    rounded = exact.astype(np.float16)
    higher = np.nextafter(rounded, np.float16(np.inf), dtype=np.float16)
    result = np.where(rounded < exact, higher, rounded)
    return np.where(result == 0, np.float16(1), result).astype(np.float16)


def _fp8(values: NDArray[Any]) -> NDArray[Any]:
    import onnx

    clipped = np.clip(values, -LARGEST_FP8, LARGEST_FP8)
    fp8 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.FLOAT8E4M3FN)
    return np.asarray(clipped, np.float32).astype(fp8)


def _rounding(value: str, weight: str, results: Sequence[str]) -> list[Any]:
    """Nodes that round a layer's input to FP8, and read its weight."""
    from onnx import helper

    rounded, read = results
    quantised, zero = f"{rounded}_quantized", "fp8_zero"
    factor = f"{weight}_input_scale"
    stored = [f"{weight}_quantized", f"{weight}_scale"]
    return [
        helper.make_node("QuantizeLinear", [value, factor, zero], [quantised], quantised),
        helper.make_node("DequantizeLinear", [quantised, factor, zero], [rounded], rounded),
        helper.make_node("DequantizeLinear", stored, [read], read, axis=1),
    ]


def _switching(
    index: int, exact: Sequence[str], rounded: list[str], constants: dict[str, Any]
) -> list[Any]:
    """Nodes that choose between a layer's fp16 and FP8 factors; ``rounded`` gets their results."""
    from onnx import helper

    switch, place = f"{rounded[0]}_switch", f"{rounded[0]}_place"
    constants[place] = np.array(index)
    nodes = [helper.make_node("Gather", [SWITCHES, place], [switch], switch)]
    for i, name in enumerate(exact):
        result = f"{rounded[i]}_chosen"
        nodes.append(helper.make_node("Where", [switch, rounded[i], name], [result], result))
        rounded[i] = result
    return nodes
