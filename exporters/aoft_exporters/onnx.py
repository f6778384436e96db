"""ONNX: one file that keeps timm's parameter names, run by ONNX Runtime.

Input ``pixel_values`` float32 [batch, 3, H, W], or with ``uint8`` ``image`` uint8 [batch, H, W, 3];
output ``logits`` float32 [batch, classes]; the batch is dynamic. Weights of linear maps that run as
MatMul are stored transposed, (in, out).
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.engines import Recipe
from aoft_deploy.errors import (
    AttachError,
    CheckpointError,
    MissingExtraError,
    OutputError,
    SettingError,
)
from aoft_exporters.int8 import quantised

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.mixed import FleetModel

__all__ = [
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
OPSET = 20
"""LayerNormalization and Gelu are single operators, and every runtime of today reads it."""

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
        model = _pixel_model(model, recipe)
        example = torch.zeros(2, recipe.size, recipe.size, 3, dtype=torch.uint8)
    else:
        example = torch.zeros(2, 3, recipe.size, recipe.size)
    name = "image" if recipe.uint8 else "pixel_values"
    proto = _trace(model, {name: (example, "batch")})
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
    proto = _trace(model, examples)
    inputs = {value.name: value for value in proto.graph.input}
    for name in FLEET_TABLES:
        proto.graph.input.remove(inputs[name])
        proto.graph.initializer.append(onnx.numpy_helper.from_array(tables[name], name))
    _save(proto, path, recipe)


def _save(proto: Any, path: Path, recipe: Recipe) -> None:
    """Write the graph with its metadata, in the asked precision."""
    import onnx

    onnx.helper.set_model_props(proto, {**dict(recipe.metadata)})
    if recipe.precision == "int8":
        proto = quantised(proto)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def _trace(model: nn.Module, examples: Mapping[str, tuple[Any, str]]) -> Any:
    """The model as an optimised ONNX protobuf with timm's names on its initialisers.

    Each input is an example and the name of its first axis, which is dynamic.
    """
    import torch
    from onnxscript import optimizer

    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad(), _attention_of_four_axes():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        program = torch.onnx.export(
            model,
            tuple(example for example, _ in examples.values()),
            dynamo=True,
            input_names=list(examples),
            output_names=["logits"],
            dynamic_shapes=tuple({0: axis} for _, axis in examples.values()),
            opset_version=OPSET,
            optimize=False,  # it renames every linear weight that it transposes
            verbose=False,
        )
        assert program is not None
        _store_transposed(program.model.graph)
        optimizer.optimize_ir(program.model)
    graph = program.model.graph
    for initializer in list(graph.initializers.values()):
        name = str(initializer.name).removeprefix("model.").removeprefix("backbone.")
        initializer.name = name.replace(".base.", ".")  # a layer that a fleet folds into
    proto = program.model_proto
    names = {initializer.name for initializer in proto.graph.initializer}
    kept = [info for info in proto.graph.value_info if info.name not in names]
    del proto.graph.value_info[:]  # shapes of initialisers there break ONNX Runtime's quantiser
    proto.graph.value_info.extend(kept)
    for entry in (*proto.graph.node, *proto.graph.value_info):
        del entry.metadata_props[:]  # stack traces with paths of this machine
    return proto


@contextlib.contextmanager
def _attention_of_four_axes() -> Iterator[None]:
    """Let fused attention of other than four axes (sam, twins, nest, hiera) be translated.

    torch's translation knows (batch, heads, tokens, width) alone; more or fewer leading axes are
    flattened into the heads of a batch of one.
    """
    import torch

    functional: Any = torch.nn.functional
    fused = functional.scaled_dot_product_attention

    def flattened(q: Any, k: Any, v: Any, attn_mask: Any = None, **options: Any) -> Any:
        if q.dim() == 4:
            return fused(q, k, v, attn_mask=attn_mask, **options)
        axes = q.shape[:-2]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*axes, *attn_mask.shape[-2:]).flatten(0, -3)[None]
        q, k, v = (tensor.flatten(0, -3)[None] for tensor in (q, k, v))
        return fused(q, k, v, attn_mask=attn_mask, **options)[0].unflatten(0, axes)

    functional.scaled_dot_product_attention = flattened
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = fused


def _store_transposed(graph: Any) -> None:
    """Transpose weights where they are stored, under their own names.

    Constant folding does the same, but gives every weight a new name.
    """
    import onnx_ir

    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.name not in graph.initializers or len(weight.uses()) > 1:
            continue
        transposed = weight.const_value.numpy().transpose(node.attributes["perm"].as_ints())
        weight.const_value = onnx_ir.tensor(np.ascontiguousarray(transposed), name=weight.name)
        weight.shape = weight.const_value.shape
        node.outputs[0].replace_all_uses_with(weight)
        graph.remove(node, safe=True)


def _pixel_model(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model on uint8 pixels, normalisation folded into a copy of its patch embedding."""
    import torch
    from torch import nn

    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(projection, nn.Conv2d) or any(projection.padding):
        raise AttachError(
            f"--uint8 folds normalisation into an unpadded patch embedding, which "
            f"{type(model).__name__} does not have: export without it."
        )
    model = copy.deepcopy(model)
    weight = projection.weight.detach().double()
    mean = torch.tensor(recipe.mean, dtype=torch.float64).view(1, 3, 1, 1)
    std = torch.tensor(recipe.std, dtype=torch.float64).view(1, 3, 1, 1)
    bias = -(weight * (mean / std)).sum((1, 2, 3))
    if projection.bias is not None:
        bias = bias + projection.bias.detach().double()
    copied: Any = model.get_submodule("patch_embed.proj")
    copied.weight = nn.Parameter((weight / (255 * std)).float(), requires_grad=False)
    copied.bias = nn.Parameter(bias.float(), requires_grad=False)

    class PixelModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(image.permute(0, 3, 1, 2).float())
            return logits

    return PixelModel().eval()


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
