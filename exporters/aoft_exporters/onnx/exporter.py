"""Export to a single ONNX file with timm's parameter names, for ONNX Runtime or OpenVINO.

The input is ``pixel_values`` float32 [batch, 3, H, W], or with ``uint8`` ``image`` uint8
[batch, H, W, 3]. The output is ``logits`` float32 [batch, classes]. The batch size is dynamic.
Weights of linear layers that run as MatMul are stored transposed, (in, out).
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine, EngineOptions, FleetTables
from aoft_deploy.artefacts.exporter import Emulation, Exporter, FleetSupport
from aoft_deploy.artefacts.onnx_metadata import DIGEST, read_metadata
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.errors import ArtefactError, OutputError, SettingError
from aoft_deploy.texts import one_line
from aoft_exporters.graph.attention_lowering import ATTENTION_OPSET
from aoft_exporters.graph.cache import Unfilled
from aoft_exporters.graph.emulation import emulated
from aoft_exporters.graph.low_precision import OPSETS
from aoft_exporters.graph.models import plain_graph, unfilled_fleet_graph, unfilled_plain_graph
from aoft_exporters.graph.tracing import OPSET
from aoft_exporters.onnx.engine import OnnxEngine
from aoft_exporters.onnx.fleet import OnnxFleet
from aoft_exporters.onnx.fp16_ranges import in_range
from aoft_exporters.onnx.gpu_engine import OnnxGpuEngine
from aoft_exporters.onnx.graph_digest import graph_digest
from aoft_exporters.onnx.int8 import quantised
from aoft_exporters.onnx.model_file import stored_bytes, write_model
from aoft_exporters.onnx.precisions import GPU_ONLY
from aoft_exporters.onnx.sessions import usable_gpu
from aoft_exporters.openvino import engine as openvino_engine

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.tuning.multitask import FleetModel

__all__ = [
    "EMULATION",
    "EXPORTER",
    "describe",
    "emulation",
    "export",
    "export_fleet",
    "load",
    "stated_digest",
]

SINGLE_FILE_LIMIT = 2**31 - 2**20
"""Largest size of the weights in one ONNX file, in bytes; a protobuf message holds 2 GiB."""


def export(model: nn.Module, path: Path, spec: ExportSpec) -> None:
    """Write a plain model as an ONNX file.

    Args:
        model: A merged model in evaluation mode; it is not changed.
        path: File to write.
        spec: Input form, normalisation and metadata.

    Raises:
        OutputError: The weights do not fit into one ONNX file.
        AttachError: ``uint8`` is set, but the model has no plain patch embedding.
        SettingError: The opset is not available in this precision.
    """
    _check_size(_least_bytes(model, spec.precision), spec.precision)
    opset = _opset(spec)
    if spec.precision == "int8":  # separate maps share the quantised input and need no split of qkv
        graph = Unfilled(plain_graph(model, spec, opset=opset, separate=True), {})
    else:
        graph = unfilled_plain_graph(model, spec, opset=opset)
    _save(graph, path, spec)


def _opset(spec: ExportSpec) -> int:
    """The requested opset; by default the first with an operator Attention.

    The default of fp8 is lower: TensorRT, which computes in FP8, refuses an Attention with
    ``softmax_precision``.

    Raises:
        SettingError: The precision needs a later opset.
    """
    opset = spec.build.opset or (OPSET if spec.precision == "fp8" else ATTENTION_OPSET)
    if opset < OPSETS.get(spec.precision, OPSET):
        raise SettingError(
            f"{spec.precision} of onnx needs opset {ATTENTION_OPSET}, not {opset}: leave `opset` "
            "out."
        )
    return opset


def export_fleet(model: FleetModel, path: Path, spec: ExportSpec, tables: FleetTables) -> None:
    """Write a fleet's model and its tasks as an ONNX file.

    The inputs are ``pixel_values`` and ``task`` int64 [batch]. The output is ``logits`` float32
    [batch, classes], −inf beyond a task's own classes.

    Args:
        model: The model that all tasks share; it is not changed.
        path: File to write.
        spec: Input form and metadata; ``uint8`` is not supported.
        tables: The tasks' tables, stored as initialisers under their own names.

    Raises:
        OutputError: Weights and tables do not fit into one ONNX file.
        SettingError: ``uint8`` is set, or the opset is not available in this precision.
    """
    import onnx

    least = _least_bytes(model, spec.precision) + sum(
        table.nbytes for table in tables.by_name().values()
    )
    _check_size(least, spec.precision, fleet=True)
    graph = unfilled_fleet_graph(model, spec, tables, opset=_opset(spec))
    inputs = {value.name: value for value in graph.proto.graph.input}
    for name, table in tables.by_name().items():
        graph.proto.graph.input.remove(inputs[name])
        graph.proto.graph.initializer.append(onnx.numpy_helper.from_array(table, name))
    _save(graph, path, spec, tables)


def _save(graph: Unfilled, path: Path, spec: ExportSpec, tables: FleetTables | None = None) -> None:
    """Convert the graph to the spec's precision and write it with its metadata and digest.

    Raises:
        OutputError: The converted weights do not fit into one ONNX file.
    """
    import onnx

    metadata = dict(spec.metadata)
    if spec.precision == "int8":
        graph = Unfilled(quantised(graph.filled()), {})
    elif spec.precision != "fp32":
        proto, float_products = in_range(graph.filled(), spec, tables)
        metadata |= {"left_in_float": json.dumps(float_products)} if float_products else {}
        graph = Unfilled(proto, {})
    onnx.helper.set_model_props(graph.proto, metadata)
    _check_size(stored_bytes(graph.proto), spec.precision, fleet=tables is not None)
    write_model(*graph, path)


def _least_bytes(model: nn.Module, precision: str) -> int:
    """Lower bound of a model's size in a precision, in bytes, computed without a graph."""
    full = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return int(full) // {"fp32": 1, "tf32": 1, "fp16": 2, "bf16": 2, "fp8": 4, "int8": 4}[precision]


def _check_size(size: int, precision: str, *, fleet: bool = False) -> None:
    """Check that weights fit into one ONNX file.

    Raises:
        OutputError: They do not.
    """
    if size <= SINGLE_FILE_LIMIT:
        return
    content = "Backbone and tasks" if fleet else "The weights"
    lower = "" if precision in ("fp8", "int8") else "choose a lower `precision`, or "
    remedy = f"{lower}export to openvino or timm with `to`"
    if fleet:
        remedy = "export fewer tasks and add the others to the running fleet"
    raise OutputError(
        f"{content} take {size / 2**30:.1f} GiB in {precision}, but one ONNX file holds 2 GiB: "
        f"{remedy}."
    )


def emulation(path: Path) -> OnnxEngine:
    """An engine that emulates a low-precision file in float32; see ``emulated``."""
    import onnx

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        proto = emulated(onnx.load(path))
        metadata = {entry.key: entry.value for entry in proto.metadata_props if entry.key != DIGEST}
        onnx.helper.set_model_props(proto, metadata)  # without the digest of the original file
        onnx.save(proto, file)
        return OnnxEngine(file)


def load(path: Path, options: EngineOptions = EngineOptions()) -> Engine:
    """Open an ONNX file for inference, in ONNX Runtime or OpenVINO.

    Raises:
        ArtefactError: The file is missing or damaged.
        SettingError: The engine or device cannot run it.
        MissingExtraError: The runtime is not installed.
    """
    if options.engine == "openvino":
        return openvino_engine.load(path, options)
    if options.device in (None, "cpu"):
        return OnnxEngine(path, options.cpu_threads())
    return OnnxGpuEngine(path, options)


def stated_digest(path: Path) -> str | None:
    """The digest that a file states of its own content; None for a file of an older version.

    Raises:
        ArtefactError: The file is missing or damaged.
    """
    return read_metadata(path).get(DIGEST)


def describe(path: Path) -> dict[str, Any]:
    """Operators, inputs, outputs and metadata of a file.

    Raises:
        ArtefactError: The file is no valid ONNX model.
    """
    import onnx

    metadata = read_metadata(path)
    try:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker raise their own classes
        raise ArtefactError(f"{path} is no valid ONNX model ({one_line(error, 120)}).") from error
    return {
        "kind": "ONNX artefact",
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": [_value(value) for value in model.graph.input],
        "outputs": [_value(value) for value in model.graph.output],
        "nodes": len(model.graph.node),
        "operators": dict(Counter(node.op_type for node in model.graph.node).most_common()),
        **ArtefactInfo(metadata).entries(),
    }


def _value(value: Any) -> str:
    """Name, type and shape of an input or output, as text."""
    from onnx import TensorProto

    kind = value.type.tensor_type
    shape = ", ".join(d.dim_param or str(d.dim_value) for d in kind.shape.dim)
    return f"{value.name} {TensorProto.DataType.Name(kind.elem_type).lower()} [{shape}]"


EMULATION = Emulation(("tf32", "bf16", "fp16", "fp8"), emulation, GPU_ONLY)
"""ONNX Runtime's CPU provider computes tf32, fp16 and fp8 graphs with less rounding than a GPU."""

EXPORTER = Exporter(
    name="onnx",
    suffix=".onnx",
    precisions=("fp32", "tf32", "bf16", "fp16", "fp8", "int8"),
    engines=("onnxruntime", "openvino"),
    tolerance=5e-5,
    export=export,
    load=load,
    describe=describe,
    platform="onnxruntime_onnx",
    stated_digest=stated_digest,
    graph_digest=graph_digest,
    calibrated=("fp8",),
    opsets=(ATTENTION_OPSET, OPSET),
    fleet=FleetSupport(("mixed", "folded"), export_fleet, OnnxFleet),
    emulation=EMULATION,
    gpu=usable_gpu,
)
