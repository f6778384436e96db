"""Cache of traced graphs, without their weights.

Tracing a model takes most of an export's time and does not depend on the values of its weights. A
cached graph holds its operators, its constants and the names of its weights, some hundred
kilobytes; each export fills in the weights of its own model. A graph is cached only if it stores
every weight that its output depends on, whole or as its three row blocks q, k and v, transposed or
not; any other folded constant would hide a weight.

Of blocks that differ in the values of their weights alone, such as the twelve of a ViT, one is
traced, and the others get its nodes: most of a trace's time is spent per node.

Every export is verified against the unmerged model, with a cached graph too.

The cache is ``$AOFT_CACHE_DIR``, by default ``aoft-deploy`` in the user's cache folder. An empty
``AOFT_CACHE_DIR`` disables it. The folder can be removed at any time.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.cache import cache_folder
from aoft_deploy.errors import OutputError
from aoft_deploy.files import replacing
from aoft_exporters.graph.alike_modules import alike_modules
from aoft_exporters.graph.attention_lowering import lower
from aoft_exporters.graph.block_expansion import expanded
from aoft_exporters.graph.repeated_blocks import one_of_each_kind
from aoft_exporters.graph.tracing import OPSET, Traced, plain_name, trace

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Unfilled", "graph_of", "unfilled_graph"]

PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnx-ir")


class Unfilled(NamedTuple):
    """A graph beside its weights.

    Attributes:
        proto: An ONNX protobuf. The initialisers of the weights have a type and a shape.
        weights: Their values by name, most of them views of the model's own parameters. Weights
            that are not here are in ``proto``.
    """

    proto: Any
    weights: Mapping[str, NDArray[Any]]

    def filled(self) -> Any:
        """The protobuf with all its weights."""
        for tensor in self.proto.graph.initializer:
            if tensor.name in self.weights:
                tensor.raw_data = self.weights[tensor.name].tobytes()
        return self.proto


def graph_of(
    model: nn.Module,
    examples: Mapping[str, tuple[Any, str]],
    kind: Mapping[str, Any] | None,
    *,
    opset: int = OPSET,
    separate: bool = False,
) -> Any:
    """The model as an ONNX protobuf, from the cache if its graph is there.

    Args:
        model: As for ``unfilled_graph``.
        examples: As for ``unfilled_graph``.
        kind: As for ``unfilled_graph``.
        opset: As for ``attention_lowering.lower``.
        separate: As for ``attention_lowering.lower``.
    """
    graph = _graph(model, examples, kind).filled()
    lower(graph, opset, separate=separate)
    return graph


def unfilled_graph(
    model: nn.Module,
    examples: Mapping[str, tuple[Any, str]],
    kind: Mapping[str, Any] | None,
    *,
    opset: int = OPSET,
) -> Unfilled:
    """The model as an ONNX protobuf beside its weights, from the cache if its graph is there.

    Args:
        model: A model in evaluation mode; it is not changed.
        examples: An example of each input, and the name of its first axis, which is dynamic.
        kind: JSON values that the graph depends on besides the model's modules and shapes; None
            bypasses the cache.
        opset: As for ``attention_lowering.lower``.
    """
    graph = _graph(model, examples, kind)
    lower(graph.proto, opset)
    return graph


def _graph(
    model: nn.Module, examples: Mapping[str, tuple[Any, str]], kind: Mapping[str, Any] | None
) -> Unfilled:
    """The graph before attention is lowered."""
    import onnx

    path = None if kind is None else _cache_path(model, examples, kind)
    cached = None if path is None else _read(path)
    if path is not None and cached is None:
        cached = _skeleton(model, examples) or onnx.ModelProto()
        with contextlib.suppress(OSError, OutputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as draft:
                draft.write_bytes(cached.SerializeToString())
    weights: dict[str, NDArray[Any]] = {}
    if cached is None or not cached.graph.node:  # no cache, or a graph that cannot be cached
        cached = trace(model, examples).proto
    else:
        own = _weights(model)
        for tensor in cached.graph.initializer:
            if tensor.doc_string:
                weights[tensor.name] = _stored(own, json.loads(tensor.doc_string))
    for tensor in cached.graph.initializer:
        tensor.ClearField("doc_string")
    return Unfilled(cached, weights)


def _cache_path(
    model: nn.Module, examples: Mapping[str, tuple[Any, str]], kind: Mapping[str, Any]
) -> Path | None:
    """File of a model's graph in the cache; None if the cache is disabled."""
    folder = cache_folder()
    if folder is None:
        return None
    inputs = {
        "kind": dict(kind),
        "model": str(model),
        "state": [(n, list(t.shape), str(t.dtype)) for n, t in model.state_dict().items()],
        "examples": {n: [list(e.shape), str(e.dtype), axis] for n, (e, axis) in examples.items()},
        "versions": [_version(package) for package in PACKAGES],
        "code": _code(),
    }
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
    return folder / f"{digest}.graph"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _code() -> str:
    """Hash of this project's source code: any module may change the traced graph."""
    digest = hashlib.sha256()
    for package in ("aoft_deploy", "aoft_exporters"):
        folder = Path(str(sys.modules[package].__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> Any:
    """A cached graph, empty if the model's cannot be cached; None if there is no readable file."""
    import onnx

    try:
        return onnx.ModelProto.FromString(path.read_bytes())
    except Exception:  # missing or damaged; protobuf raises its own classes
        return None


def _skeleton(model: nn.Module, examples: Mapping[str, tuple[Any, str]]) -> Any:
    """The graph without weights; None if it does not store a weight as one of its forms.

    The ``doc_string`` of each weight's initialiser holds its name and form as JSON. Of blocks that
    are alike, only the first is traced, unless that fails.
    """
    firsts = alike_modules(model)
    if firsts:
        copied = _distinct_copy(model, [path for path, first in firsts.items() if path != first])
        try:
            with one_of_each_kind(copied, firsts) as kinds:
                proto = _without_weights(copied, trace(copied, examples, kinds))
            if proto is not None:
                expanded(proto, kinds)
            return proto
        except Exception:  # torch wraps NotAlikeError and the model's own errors in many types
            pass  # the trace of the whole model raises what is wrong with it
    copied = _distinct_copy(model, [])
    return _without_weights(copied, trace(copied, examples))


def _distinct_copy(model: nn.Module, left_out: Sequence[str]) -> nn.Module:
    """A copy of a model whose weights all have different random values.

    The copy has no weight of the model, since torch and onnxscript keep what they traced last.

    Args:
        model: The model.
        left_out: Paths of modules that are not traced. Their weights have no values, which takes no
            memory.
    """
    import torch

    prefixes = tuple(f"{path}." for path in left_out)
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    own = {id(tensor) for name, tensor in named if not name.startswith(prefixes)}
    memo: dict[int, Any] = {}
    for _, tensor in named:
        if id(tensor) not in own:
            empty = torch.empty_like(tensor, requires_grad=False)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            memo[id(tensor)] = torch.nn.Parameter(empty, False) if is_parameter else empty
    copied = copy.deepcopy(model, memo)
    _make_distinct({n: t for n, t in copied.state_dict().items() if not n.startswith(prefixes)})
    return copied


def _without_weights(model: nn.Module, traced: Traced) -> Any:
    """A traced graph without the values of weights; None if one is in none of its forms."""
    proto, used = traced
    weights = _weights(model)
    names = weights.keys() & {tensor.name for tensor in proto.graph.initializer}
    needed = names | used.intersection(weights)
    derived = {_digest(_stored(weights, form)): form for form in _forms(weights, needed - names)}
    found = set()
    for tensor in proto.graph.initializer:
        whole = [(tensor.name, 0, 1, transposed) for transposed in (False, True)]
        forms = whole if tensor.name in names else [derived.get(_digest(tensor.raw_data))]
        stored = [f for f in forms if f and _stored(weights, f).tobytes() == tensor.raw_data]
        tensor.doc_string = json.dumps(stored[0]) if stored else ""
        if stored:
            tensor.ClearField("raw_data")
            found.add(stored[0][0])
    return proto if needed <= found else None


Form = tuple[str, int, int, bool]
"""A weight's name, one of its row blocks, their number, and whether the block is transposed."""


def _forms(weights: Mapping[str, NDArray[Any]], names: Set[str]) -> Iterator[Form]:
    """Every form in which a graph can store these weights."""
    for name in sorted(names):
        rows = weights[name].shape[:1]
        for count in (1, 3) if rows and rows[0] % 3 == 0 else (1,):
            for block in range(count):
                yield from ((name, block, count, transposed) for transposed in (True, False))


def _digest(values: bytes | NDArray[Any]) -> bytes:
    content = values if isinstance(values, bytes) else values.tobytes()
    return hashlib.sha256(content).digest()


def _stored(weights: Mapping[str, NDArray[Any]], form: Form) -> NDArray[Any]:
    """A weight in one of its forms, as a view."""
    name, block, count, transposed = form
    weight = np.split(weights[name], count)[block] if count > 1 else weights[name]
    return weight.T if transposed else weight


def _make_distinct(tensors: Mapping[str, Tensor]) -> None:
    """Fill floating-point tensors of a state dict with different random values."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                positive = 0.5 if name.endswith("running_var") else -0.05
                tensor.copy_(positive + 0.1 * torch.rand(tensor.shape, generator=generator))


def _weights(model: nn.Module) -> dict[str, NDArray[Any]]:
    """Floating-point parameters and buffers by their names in a graph."""
    return {
        plain_name(name): tensor.detach().numpy()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
