"""Export to a folder with a TensorRT plan and its metadata, for an NVIDIA GPU.

``model.plan`` is the engine. ``engine.json`` holds its inputs, library, version, GPU and SHA-256,
and the graph's logits of a few built-in images. A plan is native code. It is opened only if its
hash, the TensorRT version and the GPU match the metadata, and used only if it reproduces the logits
there. So TensorRT-RTX can build a plan on a machine without a GPU.

The engine is built from the ONNX exporter's graph. The input is ``pixel_values`` float32
[batch, 3, H, W], or with ``uint8`` ``image`` uint8 [batch, H, W, 3], and for a fleet also ``task``
int64 [batch]. The output is ``logits`` float32 [batch, classes]. ``BuildOptions.batches`` sets the
range of batch sizes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import EngineOptions, FleetTables
from aoft_deploy.artefacts.exporter import DeviceSupport, Exporter, FleetSupport
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.errors import ArtefactError, SettingError, VerificationError
from aoft_exporters.graph.emulation import emulated
from aoft_exporters.graph.fleet_tables import FLEET_TABLES
from aoft_exporters.graph.tracing import plain_name
from aoft_exporters.onnx import exporter as onnx_exporter
from aoft_exporters.onnx.engine import OnnxEngine
from aoft_exporters.onnx.fp16_ranges import in_range
from aoft_exporters.tensorrt import library as libraries
from aoft_exporters.tensorrt.build import build
from aoft_exporters.tensorrt.metadata import MARKER, METADATA, Metadata, Sample, check_files
from aoft_exporters.tensorrt.refit import (
    check_refit,
    named_weights,
    refitted_plan,
    structure,
)

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.tuning.multitask import FleetModel
    from aoft_exporters.tensorrt.engine import TensorrtEngine

__all__ = [
    "EXPORTER",
    "INTERMEDIATE",
    "describe",
    "device",
    "export",
    "export_fleet",
    "load",
    "load_intermediate",
]

INTERMEDIATE = "graph.onnx"
TOLERANCE = 1e-4


def export(model: nn.Module, path: Path, spec: ExportSpec) -> None:
    """Write a plain model as a folder with an engine.

    Args:
        model: A merged model in evaluation mode; it is not changed.
        path: Folder to create.
        spec: Input form, normalisation, metadata, precision, batches, and the GPU to build for.

    Raises:
        MissingExtraError: TensorRT, TensorRT-RTX or ONNX Runtime is not installed.
        SettingError: The GPU is neither present nor named, or the installed TensorRT cannot build
            for it.
        OutputError: TensorRT cannot build the engine, or the weights exceed 2 GiB.
        VerificationError: Logits are not finite in this precision.
        AttachError: ``uint8`` is set, but the model has no plain patch embedding.
    """
    names = {plain_name(name) for name in model.state_dict()}
    _write(path, spec, names, lambda file, plain: onnx_exporter.export(model, file, plain))


def export_fleet(model: FleetModel, path: Path, spec: ExportSpec, tables: FleetTables) -> None:
    """Write a fleet's model and its tasks as a folder with an engine.

    Args:
        model: The model that all tasks share, of the mixed form; it is not changed.
        path: Folder to create.
        spec: As for ``export``; ``uint8`` is not supported.
        tables: The tasks' tables; they become constants of the engine.

    Raises:
        AoftError: As ``export``.
    """
    names = {*(plain_name(name) for name in model.state_dict()), *FLEET_TABLES}
    _write(
        path,
        spec,
        names,
        lambda file, plain: onnx_exporter.export_fleet(model, file, plain, tables),
        tables,
    )


def _write(
    path: Path,
    spec: ExportSpec,
    names: Collection[str],
    write_graph: Callable[[Path, ExportSpec], None],
    tables: FleetTables | None = None,
) -> None:
    """Write the plan, its metadata, and ``INTERMEDIATE``: a graph for ONNX Runtime.

    The graph computes what the plan computes; low precision is emulated.
    """
    import onnx

    target = libraries.target(spec.build.compute_capability)
    check_refit(spec)
    path.mkdir()
    graph_file = path / INTERMEDIATE
    metadata = {**spec.metadata, "precision": "fp32"}
    build_options = replace(spec.build, opset=20)
    plain = replace(spec, metadata=metadata, precision="fp32", build=build_options)
    write_graph(graph_file, plain)
    graph, low = onnx.load(graph_file), spec.precision != "fp32"
    _cast_pixels_first(graph.graph)
    sample = Sample.of(graph, spec)
    exact = sample.answers(OnnxEngine(graph_file))
    if low:
        graph, float_products = in_range(graph, spec, tables)
        texts = {"left_in_float": json.dumps(float_products)} if float_products else {}
        spec = replace(spec, metadata={**spec.metadata, **texts})
        onnx.helper.set_model_props(graph, {**spec.metadata, "precision": spec.precision})
        onnx.save(emulated(graph), graph_file)
    answers = sample.answers(OnnxEngine(graph_file)) if low else exact
    sample = sample.answered(answers, exact, TOLERANCE)
    weights = named_weights(graph, names) if spec.build.refittable or spec.build.refit else {}
    fixed = structure(graph, weights) if weights else ""
    plan = refitted_plan(spec, target, weights, fixed, sample)
    origin = "built" if plan is None else "refitted"
    if plan is None:
        serialised, tf32 = graph.SerializeToString(), spec.precision == "tf32"
        plan = build(serialised, target, spec.build.batch_range, list(weights), tf32=tf32)
    (path / MARKER).write_bytes(plan)
    Metadata.of(plan, target, spec, sample, fixed, origin).write(path / METADATA)


def _cast_pixels_first(graph: Any) -> None:
    """Cast pixels to float before they are transposed: TensorRT cannot transpose uint8."""
    pixels = [value.name for value in graph.input if value.name == "image"]
    transposes = [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in pixels]
    for transpose in transposes:
        pixel, transposed = transpose.input[0], transpose.output[0]
        cast = next(n for n in graph.node if n.op_type == "Cast" and n.input[0] == transposed)
        result = cast.output[0]
        cast.input[0], cast.output[0] = pixel, f"{pixel}.fp32"
        transpose.input[0], transpose.output[0] = f"{pixel}.fp32", result
        nodes = list(graph.node)
        first, second = nodes.index(transpose), nodes.index(cast)
        nodes[first], nodes[second] = cast, transpose
        del graph.node[:], graph.value_info[:]
        graph.node.extend(nodes)


def device(path: Path) -> str | None:
    """Name of this machine's GPU if the engine at ``path`` runs on it, else None."""
    gpu = libraries.find_gpu()
    fits = gpu is not None and gpu.capability == Metadata.read(path / METADATA).capability
    return gpu.name if gpu and fits else None


def load_intermediate(path: Path) -> OnnxEngine:
    """Open the graph that an engine was built from in ONNX Runtime; verification deletes it."""
    return OnnxEngine(path / INTERMEDIATE)


def load(path: Path, options: EngineOptions = EngineOptions()) -> TensorrtEngine:
    """Open a folder on a GPU of this machine.

    Args:
        path: A folder of ``export``.
        options: The device is ``cuda`` or ``cuda:1`` …; None is the first GPU. ``threads`` must be
            None.

    Raises:
        ArtefactError: The folder is missing, damaged or changed, or was built for another GPU or
            version of TensorRT.
        SettingError: Threads are given, this machine has no such GPU, or the GPU has too little
            memory.
        VerificationError: The engine's logits differ from those of its graph.
        MissingExtraError: The TensorRT that built the engine is not installed.
    """
    if not (path / MARKER).is_file():
        raise ArtefactError(f"There is no folder {path} with a {MARKER}.")
    metadata = Metadata.read(path / METADATA)
    plan = check_files(path, metadata, (MARKER, METADATA))
    if options.threads is not None:
        raise SettingError(
            f"{path} runs on a GPU, which has no threads to choose: leave `threads` out."
        )
    index = _index(options.device)
    gpu = None if index is None else libraries.find_gpu(index)
    if gpu is None or index is None:
        raise SettingError(
            f"{path} needs an NVIDIA GPU of compute capability {metadata.capability}, and this "
            f"machine has none called {options.device or 'cuda'}: run it there, or export to onnx."
        )
    library = libraries.library(metadata.library)
    metadata.check_here(path, library.version, gpu.capability)
    from aoft_exporters.tensorrt.engine import TensorrtEngine

    opened = TensorrtEngine(plan, metadata, library, index=index, lanes=options.lanes)
    difference = metadata.sample.difference(opened, metadata.batches)
    if not difference <= metadata.sample.allowed:  # nan too
        raise VerificationError(
            f"On this {gpu.name} the engine's logits differ from its graph's by {difference:.2e}, "
            f"but at most {metadata.sample.allowed:.2e} is allowed: the engine is not used."
        )
    return opened


def _index(device: str | None) -> int | None:
    """Index of the GPU that a device names; None if it is no GPU."""
    kind, _, number = (device or "cuda").partition(":")
    return int(number or 0) if kind == "cuda" and (number or "0").isdecimal() else None


def describe(path: Path) -> dict[str, Any]:
    """Metadata of a plan, which is not opened.

    Raises:
        ArtefactError: The plan is missing, or its metadata are missing or damaged.
    """
    metadata = Metadata.read(path / METADATA)
    if not (path / MARKER).is_file():
        raise ArtefactError(f"There is no {MARKER} in {path}.")
    return {
        "kind": "TensorRT artefact",
        "batches": list(metadata.batches),
        "library": metadata.library,
        "version": metadata.version,
        "capability": metadata.capability,
        "origin": metadata.origin,
        **ArtefactInfo(metadata.info).entries(),
    }


EXPORTER = Exporter(
    name="tensorrt",
    suffix=".tensorrt",
    marker=MARKER,
    precisions=("fp32", "tf32", "fp16", "bf16", "fp8"),
    engines=("tensorrt",),
    tolerance=TOLERANCE,
    export=export,
    load=load,
    describe=describe,
    platform="tensorrt_plan",
    calibrated=("fp8",),
    ranged=True,
    fleet=FleetSupport(("mixed",), export_fleet),
    device=DeviceSupport(INTERMEDIATE, device, load_intermediate),
)
