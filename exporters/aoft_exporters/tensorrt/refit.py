"""New weights for a TensorRT engine of the same graph, without building it again.

Weights are named as timm names them and marked one by one (``REFIT_INDIVIDUAL``), which needs the
GPU already when the engine is built. All else in the graph, folded constants too, must be what it
was: ``structure`` is the hash of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

from aoft_deploy.errors import OutputError
from aoft_exporters.tensorrt.library import Library

__all__ = ["mark", "named_weights", "refitted", "structure"]


def named_weights(graph: Any, names: Collection[str]) -> dict[str, Any]:
    """Those of a graph's constants that are numbers of the model.

    Args:
        graph: An ONNX model.
        names: Of the model's parameters and of a fleet's tables.
    """
    import onnx

    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return {i.name: i for i in graph.graph.initializer if i.name in names and i.data_type in kinds}


def structure(graph: Any, weights: Mapping[str, Any]) -> str:
    """Hash of all that a refit leaves as it is.

    Args:
        graph: An ONNX model.
        weights: What ``named_weights`` found in it.
    """
    import onnx

    bare = onnx.ModelProto.FromString(graph.SerializeToString())
    del bare.metadata_props[:]
    for tensor in bare.graph.initializer:
        if tensor.name in weights:
            tensor.ClearField("raw_data")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def mark(library: Library, network: Any, config: Any, names: Collection[str]) -> None:
    """Let an engine that is built from a network take new values of these weights.

    Raises:
        OutputError: TensorRT does not know a weight by its name.
    """
    config.set_flag(library.module.BuilderFlag.REFIT_INDIVIDUAL)
    for name in names:
        if not network.mark_weights_refittable(name):
            raise OutputError(f"TensorRT does not know the weight {name}: leave `refittable` out.")


def refitted(plan: bytes, library: Library, weights: Mapping[str, Any]) -> bytes:
    """A plan with other weights.

    Args:
        plan: Of an engine with marked weights, from a source that is trusted.
        library: The TensorRT that built it.
        weights: The new ones by name, as ONNX tensors of the same types and shapes.

    Raises:
        OutputError: TensorRT takes the plan or the weights not, with its reason.
    """
    import onnx

    trt, log = library.module, library.log
    log.errors.clear()
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    refitter = None if engine is None else trt.Refitter(engine, log)
    if refitter is None or set(refitter.get_all_weights()) - set(weights):
        raise OutputError(f"TensorRT cannot refit the engine ({_reason(log)}).")
    kept = {}  # read until the refit is done
    for name in refitter.get_all_weights():
        kept[name] = values = onnx.numpy_helper.to_array(weights[name])
        kind = {"float32": trt.float32, "float16": trt.float16}.get(values.dtype.name, trt.bfloat16)
        refitter.set_named_weights(name, trt.Weights(kind, values.ctypes.data, values.size))
    if refitter.get_missing_weights() or not refitter.refit_cuda_engine():
        raise OutputError(f"TensorRT cannot refit the engine ({_reason(log)}).")
    options = engine.create_serialization_config()
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):  # from 10.14 on, to be refitted once more
        options.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    return bytes(engine.serialize_with_config(options))


def _reason(log: Any) -> str:
    return " ".join(log.errors)[:200] or "other weights are marked"
