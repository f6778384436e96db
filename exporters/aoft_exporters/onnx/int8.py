"""8-bit integers for the shared weights of an ONNX graph, by ONNX Runtime's dynamic quantisation.

Weights become signed integers with a scale for each output channel; activations are quantised as
they come. What differs from image to image is left in float32: attention, softmax, LayerNorm, the
tasks' own numbers of a fleet, and the classifier.

What stays in float32 keeps its name. A quantised weight ``NAME`` becomes ``NAME_quantized``, int8
(in, out), with ``NAME_scale`` and ``NAME_zero_point`` for each output channel.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from aoft_exporters.onnx.engine import library

__all__ = ["quantised"]

TRANSPOSED = re.compile(r"(.+)_Transposed(?:_\d+)?(_quantized|_scale|_zero_point|)")
"""What the quantiser calls the weight of a Gemm that it writes as MatMul."""


def quantised(proto: Any) -> Any:
    """The model with its linear maps in int8.

    The weights take 7 bits: with 8, processors without VNNI would saturate in their products and
    answer otherwise than the machine that verified.

    Args:
        proto: An ONNX model in float32; it is not changed.

    Returns:
        A new ONNX model, metadata included.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    import onnx

    library()
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "int8.onnx"
        quantization.quantize_dynamic(
            proto,  # the quantiser works on a copy
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=_classifier(proto.graph),
            use_external_data_format=True,  # what is left may still be more than 2 GiB
            extra_options={"MatMulConstBOnly": True},
        )
        result = onnx.load(path)
    _restore_names(result.graph, {tensor.name for tensor in proto.graph.initializer})
    del result.metadata_props[:]
    result.metadata_props.extend(proto.metadata_props)
    result.producer_name, result.producer_version = proto.producer_name, proto.producer_version
    return result


def _restore_names(graph: Any, known: Collection[str]) -> None:
    """Give weights that the quantiser transposed their own names, unless those are in use."""
    taken = {tensor.name for tensor in graph.initializer}
    renamed = {}
    for tensor in graph.initializer:
        found = TRANSPOSED.fullmatch(tensor.name)
        if found and found[1] in known and found[1] + found[2] not in taken:
            renamed[tensor.name] = tensor.name = found[1] + found[2]
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)


def _classifier(graph: Any) -> list[str]:
    """Names of the linear map that makes the logits, if it is one: its own, and as a MatMul."""
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get(graph.output[0].name)
    while node is not None and node.op_type in ("Add", "Identity", "Reshape", "Cast"):
        node = next((makers[name] for name in node.input if name in makers), None)
    return [] if node is None else [node.name, f"{node.name}_MatMul"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No advice from the quantiser, which knows nothing of how the model was made."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
