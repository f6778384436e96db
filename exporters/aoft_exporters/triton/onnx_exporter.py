"""Triton: a model for a repository of NVIDIA's inference server, run by its ONNX Runtime.

The artefact is the model's folder: ``config.pbtxt``, ``labels.txt`` (of a fleet ``tasks.json``),
and the ONNX exporter's file as ``1/model.onnx``. The folder that it stands in is the repository,
and its own name the model's, so models come and go by one rename each.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.artefacts.engine import Engine, EngineOptions, FleetTables
from aoft_deploy.artefacts.exporter import Emulation, FleetSupport
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.errors import ArtefactError
from aoft_exporters.graph.attention_lowering import ATTENTION_OPSET
from aoft_exporters.graph.tracing import OPSET
from aoft_exporters.onnx import exporter as onnx_exporter
from aoft_exporters.triton.config import check_labels, write_config

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.tuning.multitask import FleetModel

__all__ = ["EXPORTER", "MARKER", "emulation", "export", "export_fleet", "load"]

MARKER = "1/model.onnx"


def export(model: nn.Module, path: Path, spec: ExportSpec) -> None:
    """Write a plain model as a folder of a model repository.

    Args:
        model: A merged model in evaluation mode; it is not changed.
        path: Folder to make.
        spec: Input form, normalisation, metadata, precision, and the largest batch.

    Raises:
        SettingError: A class has a line break in its name.
        OutputError: The weights do not fit into a single ONNX file.
        AttachError: ``uint8`` is asked of a model without a plain patch embedding.
    """
    check_labels(spec)
    file = _new_version(path)
    onnx_exporter.export(model, file, _of_old_opset(spec))
    write_config(path, spec, "onnxruntime")


def export_fleet(model: FleetModel, path: Path, spec: ExportSpec, tables: FleetTables) -> None:
    """Write a fleet as a folder of a model repository.

    Args:
        model: The model that all tasks share, of the mixed form; it is not changed.
        path: Folder to make.
        spec: As for ``export``, without ``uint8``.
        tables: As for the ONNX exporter.

    Raises:
        AoftError: As ``export``.
    """
    file = _new_version(path)
    onnx_exporter.export_fleet(model, file, _of_old_opset(spec), tables)
    write_config(path, spec, "onnxruntime")


def _new_version(path: Path) -> Path:
    """Path of the model's file in version 1, whose folder is made."""
    file = path / MARKER
    file.parent.mkdir(parents=True)
    return file


def emulation(path: Path) -> Engine:
    """The model in the folder with every result rounded to its precision."""
    return onnx_exporter.emulation(path / MARKER)


def _of_old_opset(spec: ExportSpec) -> ExportSpec:
    """With the older opset as the default: servers are updated more rarely than clients."""
    return replace(spec, build=replace(spec.build, opset=spec.build.opset or OPSET))


def load(path: Path, options: EngineOptions = EngineOptions()) -> Engine:
    """Open the model in the folder, as Triton would; see the ONNX exporter."""
    return onnx_exporter.load(path / MARKER, options)


def describe(path: Path) -> dict[str, Any]:
    """Operators and metadata of the model in the folder."""
    if not (path / MARKER).is_file():
        raise ArtefactError(f"{path} is a Triton model without {MARKER}.")
    return {**onnx_exporter.describe(path / MARKER), "kind": "Triton artefact"}


EXPORTER = replace(
    onnx_exporter.EXPORTER,
    name="triton",
    suffix=".triton",
    marker=MARKER,
    export=export,
    load=load,
    describe=describe,
    opsets=(OPSET, ATTENTION_OPSET),
    ranged=True,
    fleet=FleetSupport(("mixed",), export_fleet),
    emulation=Emulation(("fp16",), emulation),
)
