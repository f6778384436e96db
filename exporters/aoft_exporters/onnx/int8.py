"""Quantise the weights of an ONNX graph to int8 with ONNX Runtime's dynamic quantisation.

Weights of linear maps become signed integers with a scale for each output channel; activations are
quantised at run time. Attention, softmax, LayerNorm, the task parameters of a fleet and the
classifier stay in float32.

Weights in float32 keep their names. A quantised weight ``NAME`` becomes ``NAME_quantized``, int8
(in, out), with ``NAME_scale`` and ``NAME_zero_point`` for each output channel. Of a packed qkv,
``NAME.q``, ``NAME.k`` and ``NAME.v`` are maps of their own, which share the quantised input.
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

from aoft_exporters.onnx.sessions import library

__all__ = ["quantised"]

TRANSPOSED = re.compile(r"(.+)_Transposed(?:_\d+)?(_quantized|_scale|_zero_point|)")
"""The quantiser's name for the weight of a Gemm that it rewrites as MatMul."""


def quantised(proto: Any) -> Any:
    """Convert the linear maps of a model to int8.

    Weights use 7 bits. With 8 bits, products saturate on processors without VNNI, so results would
    differ from those of the machine that verified the artefact.

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
            use_external_data_format=True,  # the rest may still exceed 2 GiB
            extra_options={"MatMulConstBOnly": True},
        )
        result = onnx.load(path)
    _restore_names(result.graph, {tensor.name for tensor in proto.graph.initializer})
    del result.metadata_props[:]
    result.metadata_props.extend(proto.metadata_props)
    result.producer_name, result.producer_version = proto.producer_name, proto.producer_version
    return result


def _restore_names(graph: Any, known: Collection[str]) -> None:
    """Restore the names of weights that the quantiser transposed, unless they are in use."""
    used = {tensor.name for tensor in graph.initializer}
    renamed = {}
    for tensor in graph.initializer:
        found = TRANSPOSED.fullmatch(tensor.name)
        if found and found[1] in known and found[1] + found[2] not in used:
            renamed[tensor.name] = tensor.name = found[1] + found[2]
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)


def _classifier(graph: Any) -> list[str]:
    """Names of the product that computes the logits, before and after the quantiser's rewrite."""
    producers = {name: node for node in graph.node for name in node.output}
    node = producers.get(graph.output[0].name)
    while node is not None and node.op_type in ("Add", "Identity", "Reshape", "Cast"):
        node = next((producers[name] for name in node.input if name in producers), None)
    return [] if node is None else [node.name, f"{node.name}_MatMul"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the quantiser's advice on preparing the model."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
