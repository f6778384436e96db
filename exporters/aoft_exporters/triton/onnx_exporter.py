"""Export to a Triton model folder, run by Triton's ONNX Runtime backend.

The folder holds ``config.pbtxt``, ``labels.txt`` (``tasks.json`` for a fleet), and the ONNX
exporter's file as ``1/model.onnx``. Its parent folder is the model repository, and its name is the
model's name. So one rename adds or removes a model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.artefacts.engine import Engine, EngineOptions, FleetTables
from aoft_deploy.artefacts.exporter import FleetSupport
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.errors import ArtefactError
from aoft_exporters.graph.attention_lowering import ATTENTION_OPSET
from aoft_exporters.graph.tracing import OPSET
from aoft_exporters.onnx import exporter as onnx_exporter
from aoft_exporters.triton.config import check_labels, serve_command, write_config

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.tuning.multitask import FleetModel

__all__ = ["EXPORTER", "MARKER", "describe", "emulation", "export", "export_fleet", "load"]

MARKER = "1/model.onnx"


def export(model: nn.Module, path: Path, spec: ExportSpec) -> None:
    """Write a plain model as a folder of a model repository.

    Args:
        model: A merged model in evaluation mode; it is not changed.
        path: Folder to create.
        spec: Input form, normalisation, metadata, precision, and batch sizes.

    Raises:
        SettingError: A class name contains a line break.
        OutputError: The weights do not fit into one ONNX file.
        AttachError: ``uint8`` is set, but the model has no plain patch embedding.
    """
    check_labels(spec)
    file = _create_version(path)
    onnx_exporter.export(model, file, _with_old_opset(spec))
    write_config(path, spec, "onnxruntime")


def export_fleet(model: FleetModel, path: Path, spec: ExportSpec, tables: FleetTables) -> None:
    """Write a fleet as a folder of a model repository.

    Args:
        model: The model that all tasks share, of the mixed form; it is not changed.
        path: Folder to create.
        spec: As for ``export``; ``uint8`` is not supported.
        tables: The tasks' tables; they are stored as constants.

    Raises:
        AoftError: As ``export``.
    """
    file = _create_version(path)
    onnx_exporter.export_fleet(model, file, _with_old_opset(spec), tables)
    write_config(path, spec, "onnxruntime")


def _create_version(path: Path) -> Path:
    """Create the folder of version 1 and return the path of its model file."""
    file = path / MARKER
    file.parent.mkdir(parents=True)
    return file


def emulation(path: Path) -> Engine:
    """An engine that emulates the folder's model with every result rounded to its precision."""
    return onnx_exporter.emulation(path / MARKER)


def _with_old_opset(spec: ExportSpec) -> ExportSpec:
    """The spec with opset 20, which older Triton servers support too, as the default.

    The default of bf16, which opset 20 lacks, is that of the ONNX exporter.
    """
    opset = spec.build.opset or (None if spec.precision == "bf16" else OPSET)
    return replace(spec, build=replace(spec.build, opset=opset))


def load(path: Path, options: EngineOptions = EngineOptions()) -> Engine:
    """Open the folder's model; see the ONNX exporter."""
    return onnx_exporter.load(path / MARKER, options)


def describe(path: Path) -> dict[str, Any]:
    """Operators and metadata of the folder's model.

    Raises:
        ArtefactError: The folder holds no valid ONNX model.
    """
    if not (path / MARKER).is_file():
        raise ArtefactError(f"{path} is a Triton model without {MARKER}.")
    return {**onnx_exporter.describe(path / MARKER), "kind": "Triton artefact"}


EXPORTER = replace(
    onnx_exporter.EXPORTER,
    name="triton",
    suffix=".triton",
    stated_digest=None,
    graph_digest=None,
    marker=MARKER,
    export=export,
    load=load,
    describe=describe,
    opsets=(OPSET, ATTENTION_OPSET),
    ranged=True,
    fleet=FleetSupport(("mixed",), export_fleet),
    emulation=replace(onnx_exporter.EMULATION, load=emulation),
    next_step=serve_command,
)
