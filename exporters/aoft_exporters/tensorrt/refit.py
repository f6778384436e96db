"""New weights for a TensorRT engine of the same graph, without building it again.

Weights are named as timm names them and marked one by one (``REFIT_INDIVIDUAL``), which needs the
GPU already when the engine is built. All else in the graph, folded constants too, must be what it
was: ``structure`` is the hash of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.errors import ArtefactError, OutputError, SettingError
from aoft_exporters.tensorrt import library as libraries
from aoft_exporters.tensorrt.library import Library
from aoft_exporters.tensorrt.metadata import MARKER, METADATA, Metadata, Sample, check_files

if TYPE_CHECKING:
    pass

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


def check_refit(spec: ExportSpec) -> None:
    """Refuse new weights, now or later, without the GPU that takes them.

    Raises:
        SettingError: There is none.
        ArtefactError: What is to be refitted is no engine.
    """
    if not spec.build.refit and not spec.build.refittable:
        return
    if libraries.find_gpu() is None:
        raise SettingError(
            "TensorRT builds and refits engines with replaceable weights on the GPU alone, and "
            "this machine has none: leave `refit` and `refittable` out."
        )
    if spec.build.refit and not (spec.build.refit / MARKER).is_file():
        raise ArtefactError(f"There is no folder {spec.build.refit} with a {MARKER} to refit.")


def refitted_plan(
    spec: ExportSpec,
    target: libraries.Target,
    weights: Mapping[str, Any],
    fixed: str,
    sample: Sample,
) -> bytes | None:
    """The named engine with new weights; None where one must be built.

    That is where the named one is of another graph, range, version or GPU, takes no new weights, or
    does not answer as it must once it has them.
    """
    if spec.build.refit is None:
        return None
    old = Metadata.read(spec.build.refit / METADATA)
    plan = check_files(spec.build.refit, old, (MARKER, METADATA))
    ours = (
        fixed,
        spec.build.batch_range,
        target.library.name,
        target.library.version,
        target.capability,
    )
    if ours != (old.structure, old.batches, old.library, old.version, old.capability):
        return None
    from aoft_exporters.tensorrt.engine import TensorrtEngine

    try:
        plan = refitted(plan, target.library, weights)
        new = Metadata.of(plan, target, spec, sample, fixed, "refitted")
        difference = sample.difference(
            TensorrtEngine(plan, new, target.library), spec.build.batch_range
        )
    except (OutputError, ArtefactError, RuntimeError):
        return None
    return plan if difference <= sample.allowed else None
