"""Export to a Triton model folder, run by Triton's TensorRT backend.

The folder is that of the exporter ``triton``, with the TensorRT exporter's ``model.plan`` and
``engine.json`` as version 1. Triton runs plans of ``tensorrt`` only, built on the GPU that serves
them and with the TensorRT version that Triton contains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.artefacts.engine import EngineOptions, FleetTables
from aoft_deploy.artefacts.exporter import DeviceSupport, FleetSupport
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.errors import SettingError
from aoft_exporters.tensorrt import exporter as tensorrt_exporter
from aoft_exporters.tensorrt import library
from aoft_exporters.tensorrt.metadata import MARKER
from aoft_exporters.triton.config import check_labels, serve_command, write_config

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.tuning.multitask import FleetModel
    from aoft_exporters.onnx.engine import OnnxEngine
    from aoft_exporters.tensorrt.engine import TensorrtEngine

__all__ = ["EXPORTER", "describe", "device", "export", "export_fleet", "load", "load_intermediate"]

VERSION = "1"


def export(model: nn.Module, path: Path, spec: ExportSpec) -> None:
    """Write a plain model as a folder of a model repository.

    Args:
        model: A merged model in evaluation mode; it is not changed.
        path: Folder to create.
        spec: As for the TensorRT exporter.

    Raises:
        SettingError: A class name contains a line break, or only tensorrt-rtx is installed.
        AoftError: As the TensorRT exporter's ``export``.
    """
    check_labels(spec)
    _write(path, spec, lambda version: tensorrt_exporter.export(model, version, spec))


def export_fleet(model: FleetModel, path: Path, spec: ExportSpec, tables: FleetTables) -> None:
    """Write a fleet as a folder of a model repository.

    Args:
        model: The model that all tasks share, of the mixed form; it is not changed.
        path: Folder to create.
        spec: As for the TensorRT exporter.
        tables: The tasks' tables; they become constants of the engine.

    Raises:
        AoftError: As ``export``.
    """
    _write(path, spec, lambda version: tensorrt_exporter.export_fleet(model, version, spec, tables))


def _write(path: Path, spec: ExportSpec, write_plan: Callable[[Path], None]) -> None:
    if library.target(spec.build.compute_capability).library.name != "tensorrt":
        raise SettingError(
            "Triton does not run plans of tensorrt-rtx: install tensorrt on a machine with the "
            "serving GPU, or export to triton, which uses ONNX."
        )
    path.mkdir()
    write_plan(path / VERSION)
    write_config(path, spec, "tensorrt")


def device(path: Path) -> str | None:
    """Name of this machine's GPU if the engine at ``path`` runs on it, else None."""
    return tensorrt_exporter.device(path / VERSION)


def load_intermediate(path: Path) -> OnnxEngine:
    """Open the graph that the engine was built from in ONNX Runtime; verification deletes it."""
    return tensorrt_exporter.load_intermediate(path / VERSION)


def load(path: Path, options: EngineOptions = EngineOptions()) -> TensorrtEngine:
    """Open the folder's plan on a GPU of this machine; see the TensorRT exporter."""
    return tensorrt_exporter.load(path / VERSION, options)


def describe(path: Path) -> dict[str, Any]:
    """Metadata of the folder's plan.

    Raises:
        ArtefactError: The plan is missing, or its metadata are missing or damaged.
    """
    return {**tensorrt_exporter.describe(path / VERSION), "kind": "Triton artefact with TensorRT"}


EXPORTER = replace(
    tensorrt_exporter.EXPORTER,
    name="triton-tensorrt",
    suffix=".triton-tensorrt",
    marker=f"{VERSION}/{MARKER}",
    export=export,
    load=load,
    describe=describe,
    fleet=FleetSupport(("mixed",), export_fleet),
    device=DeviceSupport(f"{VERSION}/{tensorrt_exporter.INTERMEDIATE}", device, load_intermediate),
    next_step=serve_command,
)
