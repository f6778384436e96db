"""An ONNX graph in low precision, its types written into it.

Matrix products and what lies between them are in fp16 or bf16, their weights stored so. In float32
stay inputs and logits, LayerNorm, softmax and every reduction, the sums of the residual stream, the
classifier, and what does not depend on the images, such as the tasks' own numbers of a fleet. A
constant that fp16 cannot hold keeps the operator that takes it in float32, and so does a result
beyond fp16's range (65504) on real images: see ``ranges``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from aoft_deploy.errors import SettingError, UnknownNameError

__all__ = ["LARGEST_FP16", "PRECISIONS", "emulated", "left_in_float", "low_results", "typed"]

PRECISIONS = ("fp16", "bf16")

PRODUCTS = frozenset("Conv ConvTranspose Gemm MatMul".split())
"""Computed in low precision."""

BETWEEN = frozenset("Add Clip Div Gelu LeakyRelu Mul Neg Relu Sigmoid Sub Tanh".split())
"""Computed in the precision of what they take: float32 if any of it is."""

MOVES = frozenset(
    "Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape "
    "Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze Where".split()
)
"""They copy values, and so round none."""

NORMS = frozenset(
    "BatchNormalization GlobalAveragePool GroupNormalization InstanceNormalization "
    "LayerNormalization RMSNormalization Softmax".split()
)
"""What a classifier's features come from."""

NO_FLOATS = frozenset(
    "And ArgMax ArgMin Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual NonZero Not Or "
    "Shape Size Xor".split()
)
"""Their results are integers or truth values."""

OPSETS = {"fp16": 20, "bf16": 22}
"""From here on every operator of the first three sets takes the precision.

Between 20 and 22 nothing else changed in them."""

LARGEST_FP16 = 65504

MOST_LOST = 2.0**-10
"""Largest relative error of a weight in fp16: twice what rounding costs numbers that are normal."""


def typed(proto: Any, precision: str, beyond: Collection[str] = ()) -> Any:
    """The model in low precision.

    Args:
        proto: An ONNX model in float32; it is not changed.
        precision: ``fp16`` or ``bf16``.
        beyond: Tensors that leave the precision's range. What makes or takes them is in float32.

    Returns:
        A new ONNX model with the same inputs, outputs and metadata. Weights keep their names.

    Raises:
        UnknownNameError: Another precision.
        SettingError: The graph has branches or loops.
    """
    return _Typing(proto, precision, beyond).typed()


@dataclass(frozen=True)
class _Step:
    """A node, whether it is in low precision, and which of its inputs and outputs are floats."""

    node: Any
    low: bool
    given: tuple[str, ...]
    made: tuple[str, ...]


class _Typing:
    """The decision which operators are in low precision, and how it is written down."""

    def __init__(self, proto: Any, precision: str, beyond: Collection[str]) -> None:
        import onnx

        if precision not in PRECISIONS:
            raise UnknownNameError("precision of a typed graph", precision, PRECISIONS)
        self.onnx, self.precision, self.beyond = onnx, precision, frozenset(beyond)
        self.kind = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
        self.proto, self.graph = proto, proto.graph
        float32 = onnx.TensorProto.FLOAT
        self.weights = {i.name: i for i in self.graph.initializer if i.data_type == float32}
        self.low: set[str] = set()
        self.steps = self._decided()
        self.taken = [
            {n for s in self.steps if s.low is low for n in s.given} for low in (False, True)
        ]

    def _decided(self) -> list[_Step]:
        """Every node in order; ``low`` is filled with the tensors in low precision."""
        graph = self.graph
        float32 = self.onnx.TensorProto.FLOAT
        floats = {*self.weights}
        floats |= {v.name for v in graph.input if v.type.tensor_type.elem_type == float32}
        images = _depending(graph.node, [v.name for v in graph.input if _rank(v) == 4])
        classifier = _classifier(graph)
        steps = []
        for i, node in enumerate(graph.node):
            given = tuple(name for name in node.input if name in floats)
            made = tuple(node.output) if self._makes_floats(node, given) else ()
            low = i in images and i not in classifier and self._may_be_low(node, given)
            floats.update(made)
            if low:
                self.low.update(made)
            steps.append(_Step(node, low, given, made))
        return steps

    def _makes_floats(self, node: Any, given: tuple[str, ...]) -> bool:
        """Whether a node's results are float32.

        Raises:
            SettingError: The node holds graphs of its own.
        """
        values = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        if any(isinstance(value, self.onnx.GraphProto) for value in values.values()):
            raise SettingError(
                f"The graph branches ({node.op_type}), and {self.precision} is not written into "
                "branches: export in fp32."
            )
        float32 = self.onnx.TensorProto.FLOAT
        if node.op_type == "Cast":
            return bool(values["to"] == float32)
        if node.op_type in ("Constant", "ConstantOfShape"):
            return getattr(values.get("value"), "data_type", float32) == float32
        return bool(given) and node.op_type not in NO_FLOATS

    def _may_be_low(self, node: Any, given: tuple[str, ...]) -> bool:
        """Whether a node between the images and the classifier is in low precision."""
        if node.domain not in ("", "ai.onnx") or not given:
            return False
        if not self.beyond.isdisjoint((*node.input, *node.output)):
            return False
        constants = [name for name in given if name in self.weights]
        if not all(self._fits(name) for name in constants):
            return False
        if node.op_type in PRODUCTS:
            return True
        if any(len(self.weights[name].dims) > 1 for name in constants):
            return False  # positions, which start the residual stream, and biases of attention
        computed = [name for name in given if name not in self.weights]
        return node.op_type in BETWEEN | MOVES and bool(computed) and self.low.issuperset(computed)

    def _fits(self, name: str) -> bool:
        """Whether the precision holds a constant's finite values; bf16 has float32's range.

        Weights must not lose more to rounding than normal numbers do: those below 6e-5 are
        subnormal in fp16.
        """
        if self.precision == "bf16":
            return True
        values = self.onnx.numpy_helper.to_array(self.weights[name])
        finite = values[np.isfinite(values)]
        if np.abs(finite).max(initial=0) > LARGEST_FP16:
            return False
        lost = np.linalg.norm(finite - finite.astype(np.float16).astype(np.float32))
        return values.ndim < 2 or bool(lost <= MOST_LOST * np.linalg.norm(finite))

    def typed(self) -> Any:
        """A new model with casts where the type changes, and each weight in the type it is in."""
        result = self.onnx.ModelProto(ir_version=self.proto.ir_version)
        for name in ("producer_name", "producer_version"):
            setattr(result, name, getattr(self.proto, name))
        result.metadata_props.extend(self.proto.metadata_props)
        result.opset_import.extend(self.proto.opset_import)
        for entry in result.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = max(entry.version, OPSETS[self.precision])
        graph = result.graph  # without value_info, which has the types before
        graph.name = self.graph.name
        graph.input.extend(self.graph.input)
        graph.output.extend(self.graph.output)
        graph.node.extend(self._linked())
        graph.initializer.extend(self._stored())
        return result

    def _linked(self) -> list[Any]:
        """All nodes, and between two types a cast, once for each tensor."""
        nodes, names = list[Any](), dict[tuple[str, bool], str]()
        for step in self.steps:
            node = self.onnx.NodeProto()
            node.CopyFrom(step.node)
            for i, name in enumerate(node.input):
                if node.op_type == "Cast" or name not in step.given:
                    continue
                if step.low is (name in self.low) or (step.low and self._stored_low(name)):
                    continue
                if (name, step.low) not in names:
                    result = f"{name}.{self.precision if step.low else 'fp32'}"
                    kind = self.kind if step.low else self.onnx.TensorProto.FLOAT
                    nodes.append(_cast(name, result, kind))
                    names[name, step.low] = result
                node.input[i] = names[name, step.low]
            nodes.append(node)
        return nodes

    def _stored_low(self, name: str) -> bool:
        """Whether a weight is taken in low precision alone."""
        return name in self.weights and name in self.taken[1] and name not in self.taken[0]

    def _stored(self) -> Iterator[Any]:
        """The weights, rounded where low precision alone takes them."""
        dtype = self.onnx.helper.tensor_dtype_to_np_dtype(self.kind)
        for tensor in self.graph.initializer:
            if self._stored_low(tensor.name):
                rounded = self.onnx.numpy_helper.to_array(tensor).astype(dtype)
                yield self.onnx.numpy_helper.from_array(rounded, tensor.name)
            else:
                yield tensor


def emulated(proto: Any, *, rounded: bool = True) -> Any:
    """What a graph in low precision computes, in float32 with every result rounded.

    For runtimes that lack kernels in low precision or leave out the rounding between them. Sums
    within a product are in float32, as on GPUs. Weights stay stored as they are.

    Args:
        proto: What ``typed`` returned; it is not changed.
        rounded: Whether results are rounded. Without it they show how large they are.

    Returns:
        A new ONNX model with the same inputs, outputs, initialisers and metadata.
    """
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(proto)
    float32 = onnx.TensorProto.FLOAT
    nodes, kinds = list[Any](), dict[str, int]()
    for tensor in result.graph.initializer:
        if tensor.data_type in _low_kinds():
            kinds[tensor.name] = tensor.data_type
            nodes.append(_cast(tensor.name, f"{tensor.name}.stored", float32))
    stored = {name: f"{name}.stored" for name in kinds}
    for node in proto.graph.node:
        kind = _result_kind(node, kinds)
        step = onnx.NodeProto()
        step.CopyFrom(node)
        for i, name in enumerate(step.input):
            step.input[i] = stored.get(name, name)
        nodes.append(step)
        if kind is None:
            continue
        kinds.update(dict.fromkeys(node.output, kind))
        if node.op_type == "Cast":
            step.CopyFrom(_cast(step.input[0], node.output[0], float32))
        if rounded and node.op_type not in MOVES:
            for i, name in enumerate(node.output):
                step.output[i] = f"{name}.exact"
                nodes.append(_cast(step.output[i], f"{name}.low", kind))
                nodes.append(_cast(f"{name}.low", name, float32))
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def low_results(proto: Any) -> dict[str, str]:
    """What a graph in low precision computes in it.

    Returns:
        Names of tensors in low precision, and what each is called in the graph before ``typed``.
    """
    kinds = {t.name: t.data_type for t in proto.graph.initializer if t.data_type in _low_kinds()}
    found = {}
    for node in proto.graph.node:
        kind = _result_kind(node, kinds)
        if kind is not None:
            kinds.update(dict.fromkeys(node.output, kind))
            for name in node.output:
                found[name] = node.input[0] if node.op_type == "Cast" else name
    return found


def left_in_float(proto: Any) -> list[str]:
    """Which products of a graph in low precision are in float32, beside the classifier.

    Returns:
        Names of their weights, or of the products themselves where both sides are computed.
    """
    graph, low = proto.graph, low_results(proto)
    weights = {tensor.name for tensor in graph.initializer}
    images = _depending(graph.node, [v.name for v in graph.input if _rank(v) == 4])
    classifier = _classifier(graph)
    return [
        next((name for name in node.input if name in weights), node.name)
        for i, node in enumerate(graph.node)
        if node.op_type in PRODUCTS
        and i in images
        and i not in classifier
        and node.output[0] not in low
    ]


def _low_kinds() -> tuple[int, int]:
    import onnx

    return onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


def _result_kind(node: Any, kinds: Mapping[str, int]) -> int | None:
    """The low type of a node's results; None where they are of another type."""
    if node.op_type == "Cast":
        (kind,) = (attribute.i for attribute in node.attribute if attribute.name == "to")
        return kind if kind in _low_kinds() else None
    if node.op_type in NO_FLOATS:
        return None
    return next((kinds[name] for name in node.input if name in kinds), None)


def _cast(name: str, result: str, kind: int) -> Any:
    from onnx import helper

    return helper.make_node("Cast", [name], [result], f"{name}/{result}", to=kind)


def _rank(value: Any) -> int:
    return len(value.type.tensor_type.shape.dim)


def _depending(nodes: Iterable[Any], names: Iterable[str]) -> set[int]:
    """Places of the nodes whose results depend on these tensors."""
    found, known = set(), set(names)
    for i, node in enumerate(nodes):
        if known.intersection(node.input):
            found.add(i)
            known.update(node.output)
    return found


def _classifier(graph: Any) -> set[int]:
    """Places of the nodes between the features and the logits."""
    makers: Mapping[str, int] = {n: i for i, node in enumerate(graph.node) for n in node.output}
    found, open_ = set[int](), [value.name for value in graph.output]
    while open_:
        i = makers.get(open_.pop())
        if i is None or i in found or graph.node[i].op_type in NORMS:
            continue
        found.add(i)
        if graph.node[i].op_type not in PRODUCTS:
            open_ += graph.node[i].input
    return found
