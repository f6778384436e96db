"""ONNX: one file that keeps timm's parameter names, run by ONNX Runtime.

Input ``pixel_values`` float32 [batch, 3, H, W], or with ``uint8`` ``image`` uint8 [batch, H, W, 3];
output ``logits`` float32 [batch, classes]; the batch is dynamic. Weights of linear maps that run as
MatMul are stored transposed, (in, out).
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.engines import Recipe
from aoft_deploy.errors import AttachError, CheckpointError, MissingExtraError, OutputError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["SUFFIX", "TOLERANCE", "OnnxEngine", "export", "load"]

SUFFIX = ".onnx"
TOLERANCE = 5e-5
OPSET = 20
"""LayerNormalization and Gelu are single operators, and every runtime of today reads it."""

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
    import onnx
    import torch

    if recipe.uint8:
        model = _pixel_model(model, recipe)
        example = torch.zeros(2, recipe.size, recipe.size, 3, dtype=torch.uint8)
    else:
        example = torch.zeros(2, 3, recipe.size, recipe.size)
    proto = _trace(model, example, "image" if recipe.uint8 else "pixel_values")
    onnx.helper.set_model_props(proto, {**dict(recipe.metadata)})
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def _trace(model: nn.Module, example: Any, input_name: str) -> Any:
    """The model as an optimised ONNX protobuf with timm's names on its initialisers."""
    import torch
    from onnxscript import optimizer

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=[input_name],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            opset_version=OPSET,
            optimize=False,  # it renames every linear weight that it transposes
            verbose=False,
        )
        assert program is not None
        _store_transposed(program.model.graph)
        optimizer.optimize_ir(program.model)
    graph = program.model.graph
    for initializer in list(graph.initializers.values()):
        initializer.name = str(initializer.name).removeprefix("model.")
    proto = program.model_proto
    names = {initializer.name for initializer in proto.graph.initializer}
    kept = [info for info in proto.graph.value_info if info.name not in names]
    del proto.graph.value_info[:]  # shapes of initialisers there break ONNX Runtime's quantiser
    proto.graph.value_info.extend(kept)
    for entry in (*proto.graph.node, *proto.graph.value_info):
        del entry.metadata_props[:]  # stack traces with paths of this machine
    return proto


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
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "cpu") from error
        if not path.is_file():
            raise CheckpointError(f"There is no file {path}.")
        ort: Any = onnxruntime  # its stubs do not export what its documentation names
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
            self._input = self._session.get_inputs()[0]
        except Exception as error:  # ONNX Runtime raises classes of its own, all Exception
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(f"{path} is no ONNX model that can be run ({reason}).") from error

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

    def run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Logits of a batch in the file's own input form."""
        logits: Any = self._session.run(["logits"], {self.input_name: images})[0]
        return np.asarray(logits, np.float32)


def load(path: Path, *, threads: int | None = None) -> OnnxEngine:
    """Open an ONNX file for inference; see ``OnnxEngine``."""
    return OnnxEngine(Path(path), threads)
