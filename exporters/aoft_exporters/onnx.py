"""ONNX: one file that keeps timm's parameter names, run by ONNX Runtime.

Input ``pixel_values`` float32 [batch, 3, H, W], or with ``uint8`` ``image`` uint8 [batch, H, W, 3];
output ``logits`` float32 [batch, classes]; the batch is dynamic. Weights of linear maps that run as
MatMul are stored transposed, (in, out).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.engines import Recipe
from aoft_deploy.errors import (
    CheckpointError,
    MissingExtraError,
    OutputError,
    SettingError,
)
from aoft_exporters.graph_cache import graph_of
from aoft_exporters.int8 import quantised
from aoft_exporters.tracing import pixel_model

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.mixed import FleetModel

__all__ = [
    "FORMS",
    "PRECISIONS",
    "SUFFIX",
    "TOLERANCE",
    "OnnxEngine",
    "OnnxFleet",
    "export",
    "export_fleet",
    "load",
    "load_fleet",
]

SUFFIX = ".onnx"
TOLERANCE = 5e-5
PRECISIONS = ("fp32", "int8")
FORMS = ("mixed", "folded")
FLEET_TABLES = {
    "bank": "tasks",
    "heads": "rows",
    "first": "tasks",
    "count": "tasks",
    "columns": "classes",
}
"""What a fleet knows of its tasks, and what the first axis of each table counts."""

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
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size > SINGLE_FILE_LIMIT:
        raise OutputError(
            f"The weights take {size / 2**30:.1f} GiB, but one ONNX file holds 2 GiB: "
            "export with --to timm."
        )
    import torch

    if recipe.uint8:
        model = pixel_model(model, recipe)
        example = torch.zeros(2, recipe.size, recipe.size, 3, dtype=torch.uint8)
    else:
        example = torch.zeros(2, 3, recipe.size, recipe.size)
    name = "image" if recipe.uint8 else "pixel_values"
    proto = graph_of(model, {name: (example, "batch")}, _kind(recipe, model))
    _save(proto, path, recipe)


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
    if recipe.uint8:
        raise SettingError("A fleet takes normalised pixel_values: export it without --uint8.")
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    size += sum(table.nbytes for table in tables.values())
    if size > SINGLE_FILE_LIMIT:
        raise OutputError(
            f"Backbone and tasks take {size / 2**30:.1f} GiB, but one ONNX file holds 2 GiB: "
            "export fewer tasks and add the others to the running fleet."
        )
    import onnx
    import torch

    examples = {
        "pixel_values": (torch.zeros(2, 3, recipe.size, recipe.size), "batch"),
        "task": (torch.zeros(2, dtype=torch.int64), "batch"),
    }
    for name, axis in FLEET_TABLES.items():  # several rows, since one would be taken for fixed
        few = np.zeros((len(examples) + 1, *tables[name].shape[1:]), tables[name].dtype)
        examples[name] = torch.from_numpy(few), axis
    proto = graph_of(model, examples, _kind(recipe, model))
    inputs = {value.name: value for value in proto.graph.input}
    for name in FLEET_TABLES:
        proto.graph.input.remove(inputs[name])
        proto.graph.initializer.append(onnx.numpy_helper.from_array(tables[name], name))
    _save(proto, path, recipe)


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


def _save(proto: Any, path: Path, recipe: Recipe) -> None:
    """Write the graph with its metadata, in the asked precision."""
    import onnx

    onnx.helper.set_model_props(proto, {**dict(recipe.metadata)})
    if recipe.precision == "int8":
        proto = quantised(proto)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def _session(model: Path | bytes, threads: int | None, path: Path) -> Any:
    """An ONNX Runtime session on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu") from error
    ort: Any = onnxruntime  # its stubs do not export what its documentation names
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = ort.InferenceSession(model, options, ["CPUExecutionProvider"])
        session.get_inputs()[0]
    except Exception as error:  # ONNX Runtime raises classes of its own, all Exception
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path} is no ONNX model that can be run ({reason}).") from error
    return session


class OnnxEngine:
    """An ONNX file in an ONNX Runtime session on the CPU.

    Args:
        path: The file.
        threads: Threads within an operator; None lets ONNX Runtime choose.

    Raises:
        CheckpointError: The file is missing or ONNX Runtime cannot read it.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        if not path.is_file():
            raise CheckpointError(f"There is no file {path}.")
        self._session = _session(path, threads, path)
        self._input = self._session.get_inputs()[0]

    @property
    def info(self) -> Mapping[str, str]:
        """The file's metadata."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    @property
    def takes_pixels(self) -> bool:
        """Whether the input is uint8 [batch, H, W, 3]."""
        return str(self._input.type) == "tensor(uint8)"

    @property
    def input_name(self) -> str:
        """``pixel_values`` or ``image``."""
        return str(self._input.name)

    @property
    def takes_tasks(self) -> bool:
        """Whether the file is a fleet, which needs a task for each image."""
        return any(value.name == "task" for value in self._session.get_inputs())

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits of a batch in the file's own input form.

        Args:
            images: The batch.
            task: A fleet's task for each image, int64 [batch].

        Raises:
            SettingError: A fleet is run without tasks, a single model with them, or a task is
                outside the fleet.
        """
        feed: dict[str, Any] = {self.input_name: images}
        if (task is not None) is not self.takes_tasks:
            missing = "needs a task for each image" if self.takes_tasks else "holds a single task"
            raise SettingError(f"This artefact {missing}.")
        if task is not None:
            tasks = len(json.loads(self.info.get("tasks", "[]")))
            if len(task) != len(images) or ((task < 0) | (task >= tasks)).any():
                raise SettingError(
                    f"Tasks {task.tolist()[:8]} for {len(images)} images: give one from 0 to "
                    f"{tasks - 1} for each."
                )
            return _fleet_logits(self._session, images, task, {}, self.info)
        logits: Any = self._session.run(["logits"], feed)[0]
        return np.asarray(logits, np.float32)


class OnnxFleet:
    """A fleet in an ONNX Runtime session that reads the tasks' tables where the caller has them.

    Attributes:
        info: Metadata of the file.
        tables: The tasks that the file holds, as ``MixedModel.forward`` takes them.

    Args:
        path: What ``export_fleet`` wrote.
        threads: Threads within an operator; None lets ONNX Runtime choose.

    Raises:
        CheckpointError: The file is missing, damaged, or no fleet.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnx

        if not path.is_file():
            raise CheckpointError(f"There is no file {path}.")
        try:
            proto = onnx.load(path)
        except Exception as error:  # protobuf raises classes of its own
            raise CheckpointError(f"{path} is no ONNX model ({error}).") from error
        self.info = {entry.key: entry.value for entry in proto.metadata_props}
        stored = {i.name: i for i in proto.graph.initializer if i.name in FLEET_TABLES}
        if set(stored) != set(FLEET_TABLES):
            raise CheckpointError(f"{path} is no fleet: export one with aoft-export --fleet.")
        self.tables = {n: onnx.numpy_helper.to_array(i) for n, i in stored.items()}
        for name, axis in FLEET_TABLES.items():
            proto.graph.initializer.remove(stored[name])
            shape = [axis, *stored[name].dims[1:]]
            kind = stored[name].data_type
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
        self._session = _session(proto.SerializeToString(), threads, path)

    def run(
        self,
        images: NDArray[np.float32],
        task: NDArray[np.int64],
        tables: Mapping[str, NDArray[Any]],
    ) -> NDArray[np.float32]:
        """Logits, (batch, columns), −inf beyond each task's own. The tables are not copied."""
        return _fleet_logits(self._session, images, task, tables, self.info)


def _fleet_logits(
    session: Any,
    images: NDArray[Any],
    task: NDArray[np.int64],
    tables: Mapping[str, NDArray[Any]],
    info: Mapping[str, str],
) -> NDArray[np.float32]:
    """A fleet's logits; a graph that folds one task at a time gets the images task by task."""
    task = np.asarray(task, np.int64)
    feed = {"pixel_values": images, "task": task, **tables}
    if info.get("form") != "folded" or (task == task[:1]).all():
        whole: Any = session.run(["logits"], feed)[0]
        return np.asarray(whole, np.float32)
    logits: NDArray[np.float32] | None = None
    for each in np.unique(task):
        chosen = np.flatnonzero(task == each)
        part: Any = session.run(
            ["logits"], {**feed, "pixel_values": images[chosen], "task": task[chosen]}
        )[0]
        if logits is None:
            logits = np.empty((len(task), part.shape[1]), np.float32)
        logits[chosen] = part
    assert logits is not None
    return logits


def load_fleet(path: Path, *, threads: int | None = None) -> OnnxFleet:
    """Open a fleet whose tasks may change; see ``OnnxFleet``."""
    return OnnxFleet(Path(path), threads)


def load(path: Path, *, threads: int | None = None) -> OnnxEngine:
    """Open an ONNX file for inference; see ``OnnxEngine``."""
    return OnnxEngine(Path(path), threads)
