"""Triton: a model for a repository of NVIDIA's inference server, run by its ONNX Runtime.

The artefact is the model's folder: ``config.pbtxt``, ``labels.txt`` (of a fleet ``tasks.json``),
and the ONNX exporter's file as ``1/model.onnx``. The folder that it stands in is the repository,
and its own name the model's, so models come and go by one rename each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from aoft_deploy.artefacts.protocols import Engine
from aoft_deploy.artefacts.spec import Recipe
from aoft_exporters.graph.attention_lowering import ATTENTION_OPSET
from aoft_exporters.graph.tracing import OPSET
from aoft_exporters.onnx import exporter as onnx_exporter
from aoft_exporters.triton.config import check_labels, write_config

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.tuning.multitask import FleetModel

__all__ = [
    "EMULATED",
    "ENGINES",
    "FORMS",
    "MARKER",
    "OPSETS",
    "PRECISIONS",
    "RANGED",
    "SUFFIX",
    "TOLERANCE",
    "emulation",
    "export",
    "export_fleet",
    "load",
]

SUFFIX = ".triton"
MARKER = "1/model.onnx"
TOLERANCE = onnx_exporter.TOLERANCE
PRECISIONS = onnx_exporter.PRECISIONS
EMULATED = onnx_exporter.EMULATED
FORMS = ("mixed",)
RANGED = True
ENGINES = onnx_exporter.ENGINES
OPSETS = (OPSET, ATTENTION_OPSET)
"""The older first: servers are updated more rarely than clients."""


def export(model: nn.Module, path: Path, recipe: Recipe) -> None:
    """Write a plain model as a folder of a model repository.

    Args:
        model: A merged model in evaluation mode; it is not changed.
        path: Folder to make.
        recipe: Input form, normalisation, metadata, precision, and the largest batch.

    Raises:
        SettingError: A class has a line break in its name.
        OutputError: The weights do not fit into a single ONNX file.
        AttachError: ``uint8`` is asked of a model without a plain patch embedding.
    """
    check_labels(recipe)
    file = _made(path)
    onnx_exporter.export(model, file, replace(recipe, opset=recipe.opset or OPSET))
    write_config(path, recipe, "onnxruntime")


def export_fleet(
    model: FleetModel, path: Path, recipe: Recipe, tables: Mapping[str, NDArray[Any]]
) -> None:
    """Write a fleet as a folder of a model repository.

    Args:
        model: The model that all tasks share, of the mixed form; it is not changed.
        path: Folder to make.
        recipe: As for ``export``, without ``uint8``.
        tables: As for the ONNX onnx_exporter.

    Raises:
        AoftError: As ``export``.
    """
    file = _made(path)
    onnx_exporter.export_fleet(model, file, replace(recipe, opset=recipe.opset or OPSET), tables)
    write_config(path, recipe, "onnxruntime")


def _made(path: Path) -> Path:
    """The model's file in its version's folder."""
    file = path / MARKER
    file.parent.mkdir(parents=True)
    return file


def emulation(path: Path) -> Engine:
    """What the model in the folder computes where every result is rounded; see ``onnx``."""
    return onnx_exporter.emulation(path / MARKER)


def load(
    path: Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> Engine:
    """Open the model in the folder, as Triton would; see ``onnx.load``."""
    return onnx_exporter.load(Path(path) / MARKER, engine=engine, threads=threads, device=device)
