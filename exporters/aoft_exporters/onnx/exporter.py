"""ONNX: one file that keeps timm's parameter names, run by ONNX Runtime or OpenVINO.

Input ``pixel_values`` float32 [batch, 3, H, W], or with ``uint8`` ``image`` uint8 [batch, H, W, 3];
output ``logits`` float32 [batch, classes]; the batch is dynamic. Weights of linear maps that run as
MatMul are stored transposed, (in, out).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.onnx_metadata import DIGEST, digest_entry
from aoft_deploy.artefacts.protocols import Engine
from aoft_deploy.artefacts.spec import Recipe
from aoft_deploy.errors import OutputError, SettingError
from aoft_exporters.graph.attention_lowering import ATTENTION_OPSET
from aoft_exporters.graph.cache import graph_of
from aoft_exporters.graph.fleet_tables import FLEET_TABLES
from aoft_exporters.graph.low_precision import emulated
from aoft_exporters.graph.pixels import pixel_model
from aoft_exporters.graph.tracing import OPSET
from aoft_exporters.onnx.engine import OnnxEngine, OnnxFleet
from aoft_exporters.onnx.fp16_ranges import in_range
from aoft_exporters.onnx.int8 import quantised

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.tuning.multitask import FleetModel

__all__ = [
    "EMULATED",
    "ENGINES",
    "FORMS",
    "OPSETS",
    "PRECISIONS",
    "SUFFIX",
    "TOLERANCE",
    "OnnxEngine",
    "OnnxFleet",
    "emulation",
    "export",
    "export_fleet",
    "fleet_graph",
    "load",
    "load_fleet",
    "plain_graph",
]

SUFFIX = ".onnx"
TOLERANCE = 5e-5
PRECISIONS = ("fp32", "fp16", "int8")
EMULATED = ("fp16",)
"""ONNX Runtime's CPU provider keeps what lies between weights of fp16 in float32."""

ENGINES = ("onnxruntime", "openvino")
OPSETS = (ATTENTION_OPSET, OPSET)
FORMS = ("mixed", "folded")
SINGLE_FILE_LIMIT = 2**31 - 2**20
"""Bytes of weights that a single ONNX file can hold (a protobuf message ends at 2 GiB)."""


def export(model: nn.Module, path: Path, recipe: Recipe) -> None:
    """Write a plain model as an ONNX file.

    Args:
        model: A merged model in evaluation mode; it is not changed.
        path: File to write.
        recipe: Input form, normalisation and metadata.

    Raises:
        OutputError: The weights do not fit into a single ONNX file.
        AttachError: ``uint8`` is asked of a model without a plain patch embedding.
    """
    _check_size(least_bytes(model, recipe.precision), recipe.precision)
    _save(plain_graph(model, recipe, opset=_opset(recipe)), path, recipe)


def plain_graph(
    model: nn.Module, recipe: Recipe, *, opset: int = OPSET, separate: bool = False
) -> Any:
    """A plain model as an ONNX protobuf in float32.

    Args:
        model: A merged model in evaluation mode; it is not changed.
        recipe: Input form, normalisation and metadata.
        opset: One from 23 on states attention as one operator.
        separate: Let three linear maps make q, k and v.

    Raises:
        AttachError: ``uint8`` is asked of a model without a plain patch embedding.
    """
    import torch

    if recipe.uint8:
        model = pixel_model(model, recipe)
        example = torch.zeros(2, recipe.size, recipe.size, 3, dtype=torch.uint8)
    else:
        example = torch.zeros(2, 3, recipe.size, recipe.size)
    name = "image" if recipe.uint8 else "pixel_values"
    kind = _kind(recipe, model)
    return graph_of(model, {name: (example, "batch")}, kind, opset=opset, separate=separate)


def _opset(recipe: Recipe) -> int:
    """The one asked for, or the first in which attention is one operator.

    Raises:
        SettingError: The precision's types are written into graphs of opset 20 alone.
    """
    if recipe.precision != "fp16":
        return recipe.opset or ATTENTION_OPSET
    if recipe.opset not in (None, OPSET):
        raise SettingError(f"fp16 is written in opset {OPSET}: leave --opset out.")
    return OPSET


def export_fleet(
    model: FleetModel, path: Path, recipe: Recipe, tables: Mapping[str, NDArray[Any]]
) -> None:
    """Write a fleet's model and its tasks as an ONNX file.

    Inputs ``pixel_values`` and ``task`` int64 [batch]; output ``logits`` float32 [batch, classes],
    −inf beyond a task's own classes.

    Args:
        model: The model that all tasks share; it is not changed.
        path: File to write.
        recipe: Size of the input and metadata; pixels are not taken.
        tables: ``bank``, ``heads``, ``first``, ``count`` and ``columns`` of
            ``MixedModel.forward``, stored as initialisers under these names.

    Raises:
        OutputError: Weights and tables do not fit into a single ONNX file.
        SettingError: ``uint8`` is asked.
    """
    import onnx

    least = least_bytes(model, recipe.precision) + sum(table.nbytes for table in tables.values())
    _check_size(least, recipe.precision, fleet=True)
    proto = fleet_graph(model, recipe, tables, opset=_opset(recipe))
    inputs = {value.name: value for value in proto.graph.input}
    for name in FLEET_TABLES:
        proto.graph.input.remove(inputs[name])
        proto.graph.initializer.append(onnx.numpy_helper.from_array(tables[name], name))
    _save(proto, path, recipe, tables)


def fleet_graph(
    model: FleetModel, recipe: Recipe, tables: Mapping[str, NDArray[Any]], *, opset: int = OPSET
) -> Any:
    """A fleet's model as an ONNX protobuf in float32 that takes the tasks' tables as inputs.

    Args:
        model: The model that all tasks share; it is not changed.
        recipe: Size of the input and metadata; pixels are not taken.
        tables: The tasks' tables, for their shapes.
        opset: One from 23 on states attention as one operator.

    Raises:
        SettingError: ``uint8`` is asked.
    """
    if recipe.uint8:
        raise SettingError("A fleet takes normalised pixel_values: export it without --uint8.")
    import torch

    examples = {
        "pixel_values": (torch.zeros(2, 3, recipe.size, recipe.size), "batch"),
        "task": (torch.zeros(2, dtype=torch.int64), "batch"),
    }
    for name, axis in FLEET_TABLES.items():  # several rows, since one would be taken for fixed
        few = np.zeros((len(examples) + 1, *tables[name].shape[1:]), tables[name].dtype)
        examples[name] = torch.from_numpy(few), axis
    return graph_of(model, examples, _kind(recipe, model), opset=opset)


def _kind(recipe: Recipe, model: nn.Module) -> dict[str, Any] | None:
    """What the graph depends on, beside its weights: not on the method once it is merged.

    None where the recipe does not name the backbone.
    """
    if "backbone" not in recipe.metadata:
        return None
    plain = not any("prompts" in name for name in model.state_dict()) and "tasks" not in (
        recipe.metadata
    )
    told = {key: recipe.metadata.get(key) for key in ("method", "settings", "form")}
    backbone = json.loads(recipe.metadata["backbone"])
    architecture = {key: backbone.get(key) for key in ("name", "args")}
    return {**({} if plain else told), **architecture, "size": recipe.size, "uint8": recipe.uint8}


def _save(
    proto: Any, path: Path, recipe: Recipe, tables: Mapping[str, NDArray[Any]] | None = None
) -> None:
    """Write the graph with its metadata, in the asked precision.

    Raises:
        OutputError: In that precision it does not fit into a single ONNX file.
    """
    import onnx

    metadata = dict(recipe.metadata)
    if recipe.precision == "int8":
        proto = quantised(proto)
    elif recipe.precision != "fp32":
        proto, left = in_range(proto, recipe, tables)
        metadata |= {"left_in_float": json.dumps(left)} if left else {}
    onnx.helper.set_model_props(proto, metadata)
    _check_size(stored_bytes(proto), recipe.precision, fleet=tables is not None)
    content = proto.SerializeToString()  # once: with the weights it takes a second
    onnx.checker.check_model(content)
    with path.open("wb") as file:
        file.write(content)
        file.write(digest_entry(content))


def least_bytes(model: nn.Module, precision: str) -> int:
    """Fewest bytes that a model's weights can take in a precision: no graph is made to know it."""
    whole = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return int(whole) // {"fp32": 1, "fp16": 2, "int8": 4}[precision]


def stored_bytes(proto: Any) -> int:
    """Bytes of all values that an ONNX model holds."""
    import onnx

    return sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in proto.graph.initializer
    )


def _check_size(size: int, precision: str, *, fleet: bool = False) -> None:
    """Refuse what does not fit into a single ONNX file.

    Raises:
        OutputError: With the size, and what to do.
    """
    if size <= SINGLE_FILE_LIMIT:
        return
    whose = "Backbone and tasks" if fleet else "The weights"
    lower = "" if precision == "int8" else "choose a lower --precision, or "
    instead = f"{lower}export with --to openvino or timm"
    if fleet:
        instead = "export fewer tasks and add the others to the running fleet"
    raise OutputError(
        f"{whose} take {size / 2**30:.1f} GiB in {precision}, but one ONNX file holds 2 GiB: "
        f"{instead}."
    )


def emulation(path: Path) -> OnnxEngine:
    """What the file at ``path``, in a low precision, computes where every result is rounded."""
    import onnx

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        proto = emulated(onnx.load(path))
        told = {entry.key: entry.value for entry in proto.metadata_props if entry.key != DIGEST}
        onnx.helper.set_model_props(proto, told)  # the digest is of the file at path
        onnx.save(proto, file)
        return OnnxEngine(file)


def load_fleet(path: Path, *, threads: int | None = None) -> OnnxFleet:
    """Open a fleet whose tasks may change; see ``OnnxFleet``."""
    return OnnxFleet(Path(path), threads)


def load(
    path: Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> Engine:
    """Open an ONNX file for inference, in ONNX Runtime or OpenVINO.

    Raises:
        CheckpointError: The file is missing or damaged.
        SettingError: The engine or device cannot run it.
        MissingExtraError: The runtime is not installed.
    """
    if engine == "openvino":
        from aoft_exporters.openvino import exporter as openvino_exporter

        return openvino_exporter.load(Path(path), threads=threads, device=device)
    return OnnxEngine(Path(path), threads, device or "cpu")
