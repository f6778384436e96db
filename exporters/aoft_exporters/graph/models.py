"""Float32 ONNX graphs of merged models and fleets, shared by the exporters."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from aoft_deploy.artefacts.engine import FleetTables
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.errors import SettingError
from aoft_exporters.graph.cache import Unfilled, graph_of, unfilled_graph
from aoft_exporters.graph.fleet_tables import FLEET_TABLES
from aoft_exporters.graph.pixels import pixel_model
from aoft_exporters.graph.tracing import OPSET

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.tuning.multitask import FleetModel

__all__ = ["fleet_graph", "plain_graph", "unfilled_fleet_graph", "unfilled_plain_graph"]


def plain_graph(
    model: nn.Module, spec: ExportSpec, *, opset: int = OPSET, separate: bool = False
) -> Any:
    """A plain model as an ONNX protobuf in float32.

    Args:
        model: As for ``unfilled_plain_graph``.
        spec: As for ``unfilled_plain_graph``.
        opset: As for ``unfilled_plain_graph``.
        separate: Compute q, k and v by three linear maps.

    Raises:
        AttachError: As ``unfilled_plain_graph``.
    """
    return graph_of(*_plain(model, spec), opset=opset, separate=separate)


def unfilled_plain_graph(model: nn.Module, spec: ExportSpec, *, opset: int = OPSET) -> Unfilled:
    """A plain model as an ONNX protobuf in float32 beside its weights.

    Args:
        model: A merged model in evaluation mode; it is not changed.
        spec: Input form, normalisation and metadata.
        opset: ONNX opset. From 23 on, attention is one operator.

    Raises:
        AttachError: ``uint8`` is set, but the model has no plain patch embedding.
    """
    return unfilled_graph(*_plain(model, spec), opset=opset)


def fleet_graph(
    model: FleetModel,
    spec: ExportSpec,
    tables: FleetTables,
    *,
    opset: int = OPSET,
    separate: bool = False,
) -> Any:
    """A fleet's model as an ONNX protobuf in float32, with the tasks' tables as inputs.

    Args:
        model: As for ``unfilled_fleet_graph``.
        spec: As for ``unfilled_fleet_graph``.
        tables: As for ``unfilled_fleet_graph``.
        opset: As for ``unfilled_fleet_graph``.
        separate: As for ``plain_graph``.

    Raises:
        SettingError: As ``unfilled_fleet_graph``.
    """
    return graph_of(*_fleet(model, spec, tables), opset=opset, separate=separate)


def unfilled_fleet_graph(
    model: FleetModel, spec: ExportSpec, tables: FleetTables, *, opset: int = OPSET
) -> Unfilled:
    """A fleet's model in float32 beside its weights, with the tasks' tables as inputs.

    Args:
        model: The model that all tasks share; it is not changed.
        spec: Input form and metadata; ``uint8`` is not supported.
        tables: The tasks' tables; only their shapes and types are used.
        opset: ONNX opset. From 23 on, attention is one operator.

    Raises:
        SettingError: ``uint8`` is set.
    """
    return unfilled_graph(*_fleet(model, spec, tables), opset=opset)


Source = tuple["nn.Module", dict[str, tuple[Any, str]], "dict[str, Any] | None"]
"""What a graph is traced from: the first arguments of ``unfilled_graph``."""


def _plain(model: nn.Module, spec: ExportSpec) -> Source:
    import torch

    if spec.input.uint8:
        model = pixel_model(model, spec.input)
    example = torch.from_numpy(spec.input.zeros(2))
    return model, {spec.input.name: (example, "batch")}, _kind(spec, model)


def _fleet(model: FleetModel, spec: ExportSpec, tables: FleetTables) -> Source:
    if spec.input.uint8:
        raise SettingError("A fleet takes normalised pixel_values: leave `uint8` out.")
    import torch

    examples = {
        "pixel_values": (torch.from_numpy(spec.input.zeros(2)), "batch"),
        "task": (torch.zeros(2, dtype=torch.int64), "batch"),
    }
    for name, table in tables.by_name().items():
        axis = FLEET_TABLES[name]
        # torch fixes a dynamic axis whose example has length 1
        example = np.zeros((len(examples) + 1, *table.shape[1:]), table.dtype)
        examples[name] = torch.from_numpy(example), axis
    return model, examples, _kind(spec, model)


def _kind(spec: ExportSpec, model: nn.Module) -> dict[str, Any] | None:
    """JSON values that the graph depends on; None if the metadata do not name the backbone.

    The method matters for fleets and prompts only: all others merge into the plain backbone.
    """
    if "backbone" not in spec.metadata:
        return None
    plain = not any("prompts" in name for name in model.state_dict()) and "tasks" not in (
        spec.metadata
    )
    method = {key: spec.metadata.get(key) for key in ("method", "settings", "form")}
    backbone = json.loads(spec.metadata["backbone"])
    architecture = {key: backbone.get(key) for key in ("name", "args")}
    return {**({} if plain else method), **architecture, "input": spec.input.to_dict()}
