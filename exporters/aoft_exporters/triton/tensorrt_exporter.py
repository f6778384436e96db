"""Triton with TensorRT: a model for a repository of NVIDIA's inference server, run by its TensorRT.

The folder is that of the exporter ``triton`` with the TensorRT exporter's ``model.plan`` and
``engine.json`` as version 1. Triton runs plans of ``tensorrt``, which are built on the GPU that
serves them, and in the version of TensorRT that it comes with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from aoft_deploy.artefacts.spec import Recipe
from aoft_deploy.errors import SettingError
from aoft_exporters.tensorrt import exporter as tensorrt_exporter
from aoft_exporters.tensorrt import library
from aoft_exporters.triton.config import check_labels, write_config

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.tuning.multitask import FleetModel
    from aoft_exporters.onnx.engine import OnnxEngine
    from aoft_exporters.tensorrt.engine import TensorrtEngine

__all__ = [
    "BETWEEN",
    "ENGINES",
    "FORMS",
    "MARKER",
    "PRECISIONS",
    "RANGED",
    "SUFFIX",
    "TOLERANCE",
    "device",
    "export",
    "export_fleet",
    "load",
    "stand_in",
]

SUFFIX = ".triton-tensorrt"
MARKER = f"1/{tensorrt_exporter.MARKER}"
BETWEEN = f"1/{tensorrt_exporter.BETWEEN}"
TOLERANCE = tensorrt_exporter.TOLERANCE
PRECISIONS = tensorrt_exporter.PRECISIONS
FORMS = tensorrt_exporter.FORMS
RANGED = True
ENGINES = tensorrt_exporter.ENGINES


def export(model: nn.Module, path: Path, recipe: Recipe) -> None:
    """Write a plain model as a folder of a model repository.

    Args:
        model: A merged model in evaluation mode; it is not changed.
        path: Folder to make.
        recipe: As for the TensorRT tensorrt_exporter.

    Raises:
        SettingError: A class has a line break in its name, or tensorrt-rtx alone is installed.
        AoftError: As the TensorRT exporter's ``export``.
    """
    check_labels(recipe)
    _write(path, recipe, lambda version: tensorrt_exporter.export(model, version, recipe))


def export_fleet(
    model: FleetModel, path: Path, recipe: Recipe, tables: Mapping[str, NDArray[Any]]
) -> None:
    """Write a fleet as a folder of a model repository.

    Args:
        model: The model that all tasks share, of the mixed form; it is not changed.
        path: Folder to make.
        recipe: As for the TensorRT tensorrt_exporter.
        tables: As for the ONNX tensorrt_exporter.

    Raises:
        AoftError: As ``export``.
    """
    _write(
        path, recipe, lambda version: tensorrt_exporter.export_fleet(model, version, recipe, tables)
    )


def _write(path: Path, recipe: Recipe, write_plan: Callable[[Path], None]) -> None:
    if library.target(recipe.compute_capability).library.name != "tensorrt":
        raise SettingError(
            "Triton does not run plans of tensorrt-rtx: install tensorrt on a machine with the GPU "
            "that serves, or export --to triton, which runs ONNX."
        )
    path.mkdir()
    write_plan(path / "1")
    write_config(path, recipe, "tensorrt")


def device(path: Path) -> str | None:
    """Name of the GPU that the engine at ``path`` runs on here; None if it is for another."""
    return tensorrt_exporter.device(path / "1")


def stand_in(path: Path) -> OnnxEngine:
    """What the engine computes, by ONNX Runtime on the CPU, while ``BETWEEN`` is there."""
    return tensorrt_exporter.stand_in(path / "1")


def load(
    path: Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> TensorrtEngine:
    """Open the plan in the folder on a GPU of this machine; see ``tensorrt.load``."""
    return tensorrt_exporter.load(Path(path) / "1", engine=engine, threads=threads, device=device)
