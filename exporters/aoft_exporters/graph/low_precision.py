"""Convert an ONNX graph to fp16 or bf16.

Matrix products, attention, the elementwise operators between them and their weights are in low
precision. Inputs, logits, LayerNorm, softmax, also within attention, reductions, the sums of the
residual stream, the classifier and all that does not depend on the images, such as the task
parameters of a fleet, stay in float32. An operator also stays in float32 if fp16 cannot hold one of
its constants, or if its inputs or results come near the end of fp16's range (65504) on real images:
see ``onnx.fp16_ranges``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from aoft_deploy.errors import SettingError, UnknownNameError
from aoft_exporters.graph.attention_steps import step_prefix
from aoft_exporters.graph.operators import (
    ELEMENTWISE,
    MOVES,
    NO_FLOATS,
    PRODUCTS,
    cast_node,
    classifier_nodes,
    depending_nodes,
    rank,
)

__all__ = ["LARGEST_FP16", "PRECISIONS", "typed"]

PRECISIONS = ("fp16", "bf16")

OPSETS = {"fp16": 20, "bf16": 22}
"""First opset in which all PRODUCTS, MOVES and ELEMENTWISE operators accept the precision, if the
graph has no Attention.

Their semantics do not change between opsets 20 and 23."""

LARGEST_FP16 = 65504

LARGEST_ERROR = 2.0**-10
"""Largest relative error of a weight in fp16: twice the rounding error of normal numbers."""


def typed(proto: Any, precision: str, beyond: Collection[str] = ()) -> Any:
    """Convert a model to low precision.

    Args:
        proto: An ONNX model in float32; it is not changed.
        precision: ``fp16`` or ``bf16``.
        beyond: Tensors beyond the precision's range. Operators that compute or use them stay in
            float32. Tensors between the steps of an attention are named as by ``spelled_out``.

    Returns:
        A new ONNX model with the same inputs, outputs and metadata. Weights keep their names.

    Raises:
        UnknownNameError: Another precision.
        SettingError: The graph has branches or loops.
    """
    return _Typing(proto, precision, beyond).typed()


@dataclass(frozen=True)
class _Step:
    """A node, whether it is in low precision, and its float inputs and outputs."""

    node: Any
    low: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Typing:
    """Chooses the operators in low precision and writes the converted graph."""

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
        self.steps = self._decide()
        self.used = [
            {n for s in self.steps if s.low is low for n in s.inputs} for low in (False, True)
        ]

    def _decide(self) -> list[_Step]:
        """A step for every node, in order. Collects the low-precision tensors in ``low``."""
        graph = self.graph
        float32 = self.onnx.TensorProto.FLOAT
        floats = {*self.weights}
        floats |= {v.name for v in graph.input if v.type.tensor_type.elem_type == float32}
        images = depending_nodes(graph.node, [v.name for v in graph.input if rank(v) == 4])
        classifier = classifier_nodes(graph)
        steps = []
        for i, node in enumerate(graph.node):
            inputs = tuple(name for name in node.input if name in floats)
            outputs = tuple(node.output) if self._makes_floats(node, inputs) else ()
            low = i in images and i not in classifier and self._may_be_low(node, inputs)
            floats.update(outputs)
            if low:
                self.low.update(outputs)
            steps.append(_Step(node, low, inputs, outputs))
        return steps

    def _makes_floats(self, node: Any, inputs: tuple[str, ...]) -> bool:
        """Whether a node's results are float32.

        Raises:
            SettingError: The node has subgraphs.
        """
        values = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        if any(isinstance(value, self.onnx.GraphProto) for value in values.values()):
            raise SettingError(
                f"The graph branches ({node.op_type}), and branches cannot be converted to "
                f"{self.precision}: export in fp32."
            )
        float32 = self.onnx.TensorProto.FLOAT
        if node.op_type == "Cast":
            return bool(values["to"] == float32)
        if node.op_type in ("Constant", "ConstantOfShape"):
            return getattr(values.get("value"), "data_type", float32) == float32
        return bool(inputs) and node.op_type not in NO_FLOATS

    def _may_be_low(self, node: Any, inputs: tuple[str, ...]) -> bool:
        """Whether a node between the images and the classifier is in low precision."""
        if node.domain not in ("", "ai.onnx") or not inputs:
            return False
        if not self.beyond.isdisjoint((*node.input, *node.output)):
            return False
        if node.op_type == "Attention" and any(
            name.startswith(step_prefix(node)) for name in self.beyond
        ):
            return False
        constants = [name for name in inputs if name in self.weights]
        if not all(self._fits(name) for name in constants):
            return False
        if node.op_type in PRODUCTS:
            return True
        if any(len(self.weights[name].dims) > 1 for name in constants):
            return False  # positions, which start the residual stream, and biases of attention
        computed = [name for name in inputs if name not in self.weights]
        return (
            node.op_type in ELEMENTWISE | MOVES and bool(computed) and self.low.issuperset(computed)
        )

    def _fits(self, name: str) -> bool:
        """Whether the precision can hold a constant's finite values; bf16 has float32's range.

        The rounding error of weights must be about that of normal numbers. Values below 6e-5 are
        subnormal in fp16.
        """
        if self.precision == "bf16":
            return True
        values = self.onnx.numpy_helper.to_array(self.weights[name])
        finite = values[np.isfinite(values)]
        if np.abs(finite).max(initial=0) > LARGEST_FP16:
            return False
        error = np.linalg.norm(finite - finite.astype(np.float16).astype(np.float32))
        return values.ndim < 2 or bool(error <= LARGEST_ERROR * np.linalg.norm(finite))

    def typed(self) -> Any:
        """A new model with a cast at every change of type, and weights in their own types."""
        result = self.onnx.ModelProto(ir_version=self.proto.ir_version)
        for name in ("producer_name", "producer_version"):
            setattr(result, name, getattr(self.proto, name))
        result.metadata_props.extend(self.proto.metadata_props)
        result.opset_import.extend(self.proto.opset_import)
        for entry in result.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = max(entry.version, OPSETS[self.precision])
        graph = result.graph  # without value_info: it has the old types
        graph.name = self.graph.name
        graph.input.extend(self.graph.input)
        graph.output.extend(self.graph.output)
        graph.node.extend(self._nodes())
        graph.initializer.extend(self._initialisers())
        return result

    def _nodes(self) -> list[Any]:
        """All nodes, with one cast for each tensor that is used in the other type."""
        nodes, names = list[Any](), dict[tuple[str, bool], str]()
        for step in self.steps:
            node = self.onnx.NodeProto()
            node.CopyFrom(step.node)
            for i, name in enumerate(node.input):
                if node.op_type == "Cast" or name not in step.inputs:
                    continue
                if step.low is (name in self.low) or (step.low and self._stored_low(name)):
                    continue
                if (name, step.low) not in names:
                    result = f"{name}.{self.precision if step.low else 'fp32'}"
                    kind = self.kind if step.low else self.onnx.TensorProto.FLOAT
                    nodes.append(cast_node(name, result, kind))
                    names[name, step.low] = result
                node.input[i] = names[name, step.low]
            if node.op_type == "Attention" and step.low:
                softmax = self.onnx.helper.make_attribute(
                    "softmax_precision", self.onnx.TensorProto.FLOAT
                )
                node.attribute.append(softmax)
            nodes.append(node)
        return nodes

    def _stored_low(self, name: str) -> bool:
        """Whether a weight is used in low precision only."""
        return name in self.weights and name in self.used[1] and name not in self.used[0]

    def _initialisers(self) -> Iterator[Any]:
        """The initialisers, rounded if they are used in low precision only."""
        dtype = self.onnx.helper.tensor_dtype_to_np_dtype(self.kind)
        for tensor in self.graph.initializer:
            if self._stored_low(tensor.name):
                rounded = self.onnx.numpy_helper.to_array(tensor).astype(dtype)
                yield self.onnx.numpy_helper.from_array(rounded, tensor.name)
            else:
                yield tensor
