"""Replace the weights of a TensorRT engine without rebuilding it.

Weights have timm's names and are marked one by one (``REFIT_INDIVIDUAL``), which requires the GPU
when the engine is built. The rest of the graph, including folded constants, must be equal:
``structure`` is its hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

from aoft_deploy.artefacts.gpu_recording import GPU_SETUP
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.errors import ArtefactError, OutputError, SettingError
from aoft_exporters.tensorrt import library as libraries
from aoft_exporters.tensorrt.library import Library
from aoft_exporters.tensorrt.metadata import MARKER, METADATA, Metadata, Sample, check_files

__all__ = ["check_refit", "mark", "named_weights", "refitted", "refitted_plan", "structure"]


def named_weights(graph: Any, names: Collection[str]) -> dict[str, Any]:
    """A graph's floating-point initialisers of the given names.

    Args:
        graph: An ONNX model.
        names: Names of the model's parameters and of a fleet's tables.
    """
    import onnx

    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return {i.name: i for i in graph.graph.initializer if i.name in names and i.data_type in kinds}


def structure(graph: Any, weights: Mapping[str, Any]) -> str:
    """Hash of the graph without the values of its refittable weights.

    Args:
        graph: An ONNX model.
        weights: Result of ``named_weights``.
    """
    import onnx

    bare = onnx.ModelProto.FromString(graph.SerializeToString())
    del bare.metadata_props[:]
    for tensor in bare.graph.initializer:
        if tensor.name in weights:
            tensor.ClearField("raw_data")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def mark(library: Library, network: Any, config: Any, names: Collection[str]) -> None:
    """Mark weights of a network as refittable.

    Raises:
        OutputError: TensorRT does not know a weight of this name.
    """
    config.set_flag(library.module.BuilderFlag.REFIT_INDIVIDUAL)
    for name in names:
        if not network.mark_weights_refittable(name):
            raise OutputError(f"TensorRT does not know the weight {name}: leave `refittable` out.")


def refitted(plan: bytes, library: Library, weights: Mapping[str, Any]) -> bytes:
    """A plan with new weights.

    Args:
        plan: A plan with refittable weights, from a trusted source.
        library: The TensorRT that built it.
        weights: New weights by name, as ONNX tensors of the same types and shapes.

    Raises:
        OutputError: TensorRT cannot load the plan or replace its weights.
    """
    with GPU_SETUP:
        return _refitted(plan, library, weights)


def _refitted(plan: bytes, library: Library, weights: Mapping[str, Any]) -> bytes:
    import onnx

    trt, log = library.module, library.log
    log.errors.clear()
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    refitter = None if engine is None else trt.Refitter(engine, log)
    if refitter is None or set(refitter.get_all_weights()) - set(weights):
        raise _failure(log)
    arrays = {}  # TensorRT reads them until the refit is done
    for name in refitter.get_all_weights():
        arrays[name] = values = onnx.numpy_helper.to_array(weights[name])
        kind = {"float32": trt.float32, "float16": trt.float16}.get(values.dtype.name, trt.bfloat16)
        if not refitter.set_named_weights(name, trt.Weights(kind, values.ctypes.data, values.size)):
            raise _failure(log)
    if refitter.get_missing_weights() or not refitter.refit_cuda_engine():
        raise _failure(log)
    options = engine.create_serialization_config()
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):  # from 10.14 on
        if not options.set_flag(trt.SerializationFlag.INCLUDE_REFIT):
            raise _failure(log)
    plan_with_weights = engine.serialize_with_config(options)
    if plan_with_weights is None:
        raise _failure(log)
    return bytes(plan_with_weights)


def _failure(log: Any) -> OutputError:
    reason = log.reason("it was built with other refittable weights")
    return OutputError(f"TensorRT cannot refit the engine ({reason}).")


def check_refit(spec: ExportSpec) -> None:
    """Check that an engine can be refitted, or built with refittable weights.

    Raises:
        SettingError: The precision is fp8, or this machine has no GPU.
        ArtefactError: The folder to refit holds no plan.
    """
    if not spec.build.refit and not spec.build.refittable:
        return
    if spec.precision == "fp8":
        raise SettingError(
            "The scales of fp8 are learned anew for each task, so an engine in it cannot be "
            "refitted: leave `refit` and `refittable` out."
        )
    if libraries.find_gpu() is None:
        raise SettingError(
            "TensorRT needs a GPU to build and refit engines with refittable weights, and this "
            "machine has none: leave `refit` and `refittable` out."
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
    """The plan of ``BuildOptions.refit`` with new weights; None if a new one must be built.

    A new one is needed if the old one differs in graph, precision, batch range, library, version or
    GPU, cannot be refitted, or does not reproduce the sample's logits.

    Raises:
        ArtefactError: The folder to refit is damaged or changed.
    """
    if spec.build.refit is None:
        return None
    old = Metadata.read(spec.build.refit / METADATA)
    plan = check_files(spec.build.refit, old, (MARKER, METADATA))
    expected = (
        fixed,
        spec.precision,
        spec.build.batch_range,
        target.library.name,
        target.library.version,
        target.capability,
    )
    built = (old.structure, old.info["precision"], old.batches)
    if expected != (*built, old.library, old.version, old.capability):
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
