"""Ways to quantise an ONNX graph beside those of the exporters, for ``quantisation.py``."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.registry import load_artefact
from aoft_exporters.onnx.engine import OnnxEngine
from aoft_exporters.onnx.int8 import quantised
from aoft_exporters.onnx.sessions import library

__all__ = ["dynamic", "load", "smoothed", "static", "weights_only"]

ALPHA = 0.5
"""SmoothQuant's share of the activations' range that moves to the weights."""

BLOCK = 32
"""Inputs that share a scale in a quantised weight of MatMulNBits."""

INT8_COMPUTE = 4
"""``accuracy_level`` of MatMulNBits that quantises activations to int8."""

Feed = Mapping[str, NDArray[Any]]


def load(path: Path, threads: int) -> Engine:
    """An engine for an artefact, or for an ONNX file without metadata."""
    if path.suffix == ".onnx":
        return OnnxEngine(path, threads)
    return load_artefact(path, EngineOptions(threads=threads))


def dynamic(proto: Any, feeds: Sequence[Feed] = ()) -> Any:
    """The exporter's own: activations are quantised at run time."""
    return quantised(proto)


def static(proto: Any, feeds: Sequence[Feed]) -> Any:
    """QDQ with fixed ranges of activations, and a scale for each output channel of a weight.

    Args:
        proto: An ONNX model in float32.
        feeds: Calibration inputs.
    """
    quantization: Any = importlib.import_module("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> Any:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "static.onnx"
        quantization.quantize_static(
            copy.deepcopy(proto),
            path,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=_classifier(proto),
            extra_options={"MatMulConstBOnly": True},
        )
        return onnx.load(path)


def weights_only(proto: Any, bits: int) -> Any:
    """MatMulNBits: weights of so many bits in blocks, for memory; activations stay in float32."""
    module: Any = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    with _quiet():
        quantiser = module.MatMulNBitsQuantizer(
            copy.deepcopy(proto),
            bits=bits,
            block_size=BLOCK,
            is_symmetric=True,
            accuracy_level=INT8_COMPUTE,
            nodes_to_exclude=_classifier(proto),
        )
        quantiser.process()
    return quantiser.model.model


def smoothed(proto: Any, feeds: Sequence[Feed]) -> Any:
    """SmoothQuant: move a part of each channel's range from a LayerNorm to the next maps' weights.

    Channel j of the norm is divided by ``max|x_j|^α / max|W_j|^(1 − α)``, and row j of the weights
    is multiplied by it, so that the model stays the same function.

    Args:
        proto: An ONNX model in float32; it is not changed.
        feeds: Calibration inputs.
    """
    result = copy.deepcopy(proto)
    graph = result.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    consumers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    norms = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "LayerNormalization"
        and all(
            each.op_type == "MatMul" and each.input[1] in constants
            for each in consumers.get(node.output[0], [])
        )
        and consumers.get(node.output[0])
    }
    for output, largest in _largest(proto, list(norms), feeds).items():
        weights = [constants[each.input[1]] for each in consumers[output]]
        rows = np.max([np.abs(_values(weight)).max(1) for weight in weights], 0)
        scale = np.maximum(largest, 1e-5) ** ALPHA / np.maximum(rows, 1e-5) ** (1 - ALPHA)
        for i, name in enumerate(norms[output].input[1:], 1):  # norms may share their parameters
            own = onnx.TensorProto(name=f"{output}/{i}")
            _set(own, _values(constants[name]) / scale)
            graph.initializer.append(own)
            norms[output].input[i] = own.name
        for weight in weights:
            _set(weight, _values(weight) * scale[:, None])
    return result


def _largest(
    proto: Any, names: Sequence[str], feeds: Sequence[Feed]
) -> dict[str, NDArray[np.float32]]:
    """The largest absolute value of each channel of some tensors, (channels,), over all inputs."""
    watched = copy.deepcopy(proto)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = library().InferenceSession(
        watched.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: dict[str, NDArray[np.float32]] = {}
    for feed in feeds:
        for name, values in zip(names, session.run(list(names), dict(feed)), strict=True):
            largest = np.abs(values).reshape(-1, values.shape[-1]).max(0)
            found[name] = np.maximum(found.get(name, largest), largest)
    return found


def _values(tensor: Any) -> NDArray[np.float32]:
    return np.asarray(onnx.numpy_helper.to_array(tensor))


def _set(tensor: Any, values: NDArray[Any]) -> None:
    tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), tensor.name))


def _classifier(proto: Any) -> list[str]:
    """Name of the product that computes the logits; the exporters leave it in float32 too."""
    producers = {name: node for node in proto.graph.node for name in node.output}
    node = producers[proto.graph.output[0].name]
    while node.op_type not in ("MatMul", "Gemm"):
        node = producers[node.input[0]]
    return [node.name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantisers' advice off the terminal."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
