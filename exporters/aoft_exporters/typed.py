"""An ONNX graph in low precision, its types written into it.

Matrix products and what lies between them are in fp16 or bf16, their weights stored so. In float32
stay inputs and logits, LayerNorm, softmax and every reduction, the sums of the residual stream, the
classifier, and what does not depend on the images, such as the tasks' own numbers of a fleet. A
constant beyond fp16's range (65504) keeps the operator that takes it in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from aoft_deploy.errors import SettingError, UnknownNameError

__all__ = ["PRECISIONS", "emulated", "typed"]

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


def typed(proto: Any, precision: str) -> Any:
    """The model in low precision.

    Args:
        proto: An ONNX model in float32; it is not changed.
        precision: ``fp16`` or ``bf16``.

    Returns:
        A new ONNX model with the same inputs, outputs and metadata. Weights keep their names.

    Raises:
        UnknownNameError: Another precision.
        SettingError: The graph has branches or loops.
    """
    return _Typing(proto, precision).typed()


def emulated(proto: Any, precision: str) -> Any:
    """What ``typed`` computes, in float32 with every weight and result rounded.

    For runtimes that lack kernels in low precision or leave out the rounding between them. It
    takes, returns and raises what ``typed`` does.
    """
    return _Typing(proto, precision).emulated()


@dataclass(frozen=True)
class _Step:
    """A node, whether it is in low precision, and which of its inputs and outputs are floats."""

    node: Any
    low: bool
    given: tuple[str, ...]
    made: tuple[str, ...]


class _Typing:
    """The decision which operators are in low precision, and the two ways to write it down."""

    def __init__(self, proto: Any, precision: str) -> None:
        import onnx

        if precision not in PRECISIONS:
            raise UnknownNameError("precision of a typed graph", precision, PRECISIONS)
        self.onnx, self.precision = onnx, precision
        self.kind = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
        self.result = onnx.ModelProto.FromString(proto.SerializeToString())
        self.graph = self.result.graph
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
        """Whether a constant's finite values are in range; bf16 has float32's."""
        if self.precision == "bf16":
            return True
        values = self.onnx.numpy_helper.to_array(self.weights[name])
        return bool(np.abs(values[np.isfinite(values)]).max(initial=0) <= LARGEST_FP16)

    def typed(self) -> Any:
        """Casts where the type changes, weights in the type that takes them."""
        float32 = self.onnx.TensorProto.FLOAT

        def convert(name: str, result: str, low: bool) -> list[Any]:
            return [self._cast(name, result, self.kind if low else float32)]

        return self._written(self._linked(convert), lambda rounded: rounded)

    def emulated(self) -> Any:
        """Rounding where ``typed`` has low precision; every tensor is float32."""

        def convert(name: str, result: str, low: bool) -> list[Any]:
            if not low:
                return [self.onnx.helper.make_node("Identity", [name], [result])]
            return self._rounding(name, result)

        nodes = []
        rounds = {
            name for s in self.steps if s.low and s.node.op_type not in MOVES for name in s.made
        }
        for node in self._linked(convert):
            nodes.append(node)
            for i, name in enumerate(node.output):
                if name in rounds:
                    node.output[i] = f"{name}.exact"
                    nodes += self._rounding(node.output[i], name)
        return self._written(nodes, lambda rounded: rounded.astype(np.float32))

    def _linked(self, convert: Callable[[str, str, bool], list[Any]]) -> list[Any]:
        """All nodes, and between two types what ``convert`` gives, once for each tensor."""
        nodes, names = list[Any](), dict[tuple[str, bool], str]()
        for step in self.steps:
            for i, name in enumerate(step.node.input):
                if step.node.op_type == "Cast" or name not in step.given:
                    continue
                if step.low is (name in self.low) or (step.low and self._stored_low(name)):
                    continue
                if (name, step.low) not in names:
                    result = f"{name}.{self.precision if step.low else 'fp32'}"
                    nodes += convert(name, result, step.low)
                    names[name, step.low] = result
                step.node.input[i] = names[name, step.low]
            nodes.append(step.node)
        return nodes

    def _stored_low(self, name: str) -> bool:
        """Whether a weight is taken in low precision alone."""
        return name in self.weights and name in self.taken[1] and name not in self.taken[0]

    def _cast(self, name: str, result: str, kind: int) -> Any:
        return self.onnx.helper.make_node("Cast", [name], [result], f"{result}.cast", to=kind)

    def _rounding(self, name: str, result: str) -> list[Any]:
        low = f"{result}.low"
        casts = (
            self._cast(name, low, self.kind),
            self._cast(low, result, self.onnx.TensorProto.FLOAT),
        )
        return list(casts)

    def _written(self, nodes: list[Any], stored: Callable[[Any], Any]) -> Any:
        """The model of these nodes, weights rounded where low precision alone takes them."""
        dtype = self.onnx.helper.tensor_dtype_to_np_dtype(self.kind)
        for name, tensor in self.weights.items():
            if self._stored_low(name):
                rounded = self.onnx.numpy_helper.to_array(tensor).astype(dtype)
                tensor.CopyFrom(self.onnx.numpy_helper.from_array(stored(rounded), name))
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        del self.graph.value_info[:]  # with the types before
        for entry in self.result.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = max(entry.version, OPSETS[self.precision])
        return self.result


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
