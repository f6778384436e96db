"""The graph of a backbone, traced once; further exports only put weights into it.

Tracing a model takes most of an export's time and depends on its weights in nothing. What is kept
is the graph with its constants and the names of its weights, some hundred kilobytes; the weights
are those of the model at hand. A graph is kept only if every weight that its answer depends on
stands in it as it is, so that none is left inside a computed constant. Exports are verified against
the unmerged model whether their graph was kept or not.

Graphs lie in ``$AOFT_CACHE_DIR``, by default ``aoft-deploy`` in the user's cache folder; an empty
``AOFT_CACHE_DIR`` turns this off. Removing the folder is safe at any time.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aoft_deploy.cache import cache_folder
from aoft_deploy.errors import OutputError
from aoft_deploy.files import replacing
from aoft_exporters.graph.attention_lowering import lower
from aoft_exporters.graph.tracing import OPSET, TRANSPOSED, plain_name, trace

if TYPE_CHECKING:
    from torch import nn

__all__ = ["graph_of"]

PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnx-ir")


def graph_of(
    model: nn.Module,
    examples: Mapping[str, tuple[Any, str]],
    kind: Mapping[str, Any] | None,
    *,
    opset: int = OPSET,
    separate: bool = False,
) -> Any:
    """The model as an ONNX protobuf, from a kept graph where there is one.

    Args:
        model: In evaluation mode; it is not changed.
        examples: An example of each input, and the name of its first axis, which is dynamic.
        kind: What the graph depends on beside the model's classes and shapes; JSON values. None
            where that is not known, and nothing is kept.
        opset: See ``attention.lower``.
        separate: Likewise.
    """
    import onnx

    path = None if kind is None else _path(model, examples, kind)
    kept = None if path is None else _kept(path)
    if path is not None and kept is None:
        kept = _skeleton(model, examples) or onnx.ModelProto()
        with contextlib.suppress(OSError, OutputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as draft:
                draft.write_bytes(kept.SerializeToString())
    if kept is None or not kept.graph.node:  # nothing kept, or a graph that cannot be
        graph = trace(model, examples).proto
    else:
        graph = kept
        _fill(graph, model)
    for tensor in graph.graph.initializer:
        tensor.ClearField("doc_string")
    lower(graph, opset, separate=separate)
    return graph


def _path(
    model: nn.Module, examples: Mapping[str, tuple[Any, str]], kind: Mapping[str, Any]
) -> Path | None:
    """Where the graph of such a model is kept; None where nothing is to be kept."""
    folder = cache_folder()
    if folder is None:
        return None
    depends = {
        "kind": dict(kind),
        "model": str(model),
        "state": [(n, list(t.shape), str(t.dtype)) for n, t in model.state_dict().items()],
        "examples": {n: [list(e.shape), str(e.dtype), axis] for n, (e, axis) in examples.items()},
        "versions": [_version(package) for package in PACKAGES],
        "code": _code(),
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()
    return folder / f"{digest}.graph"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _code() -> str:
    """Hash of this project's own code, any of which may change what is traced."""
    digest = hashlib.sha256()
    for package in ("aoft_deploy", "aoft_exporters"):
        folder = Path(str(sys.modules[package].__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _kept(path: Path) -> Any:
    """The kept graph, without nodes if the model's cannot be kept; None where nothing is there."""
    import onnx

    try:
        return onnx.ModelProto.FromString(path.read_bytes())
    except Exception:  # not there, or damaged, of which protobuf raises classes of its own
        return None


def _skeleton(model: nn.Module, examples: Mapping[str, tuple[Any, str]]) -> Any:
    """The graph without weights; None where a weight does not stand in it as it is."""
    import onnx

    model = copy.deepcopy(model)
    _make_distinct(model)
    proto, used = trace(model, examples)
    weights = _weights(model)
    found = set()
    for tensor in proto.graph.initializer:
        weight = weights.get(tensor.name)
        if weight is None:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if not np.array_equal(values, weight.T if tensor.doc_string == TRANSPOSED else weight):
            return None
        tensor.ClearField("raw_data")
        found.add(tensor.name)
    return proto if used.intersection(weights) <= found else None


def _make_distinct(model: nn.Module) -> None:
    """Give every parameter and buffer of floats numbers that no other has."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                positive = 0.5 if name.endswith("running_var") else -0.05
                tensor.copy_(positive + 0.1 * torch.rand(tensor.shape, generator=generator))


def _weights(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers of floats by the names that they have in a graph."""
    return {
        plain_name(name): tensor.detach().numpy()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }


def _fill(graph: Any, model: nn.Module) -> None:
    """Put the model's weights where the graph names them."""
    weights = _weights(model)
    for tensor in graph.graph.initializer:
        weight = weights.get(tensor.name)
        if weight is not None:
            stored = weight.T if tensor.doc_string == TRANSPOSED else weight
            tensor.raw_data = np.ascontiguousarray(stored).tobytes()
