"""An ONNX graph whose nodes are found by the values they produce and consume."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["LinkedGraph", "new_node"]


class LinkedGraph:
    """A graph's nodes by the values they produce and consume, and the replacements of nodes.

    Args:
        proto: An ONNX model; ``write`` changes it in place.
    """

    def __init__(self, proto: Any) -> None:
        self.graph = proto.graph
        self.producers = {name: node for node in proto.graph.node for name in node.output}
        self.consumers: dict[str, list[Any]] = {}
        for node in proto.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.replacements: dict[str, list[Any]] = {}
        self.outputs = {value.name for value in proto.graph.output}

    def producer(self, name: str, kind: str) -> Any:
        """The node that produces a value if it has the given operator type, else None."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type == kind else None

    def only_consumer(self, name: str, kind: str) -> Any:
        """The only node that consumes a value if it has the given operator type, else None."""
        nodes = self.consumers.get(name, [])
        matches = len(nodes) == 1 and name not in self.outputs and nodes[0].op_type == kind
        return nodes[0] if matches else None

    def integers(self, name: str) -> list[int] | None:
        """Values of an int64 constant; None if there is no such constant."""
        import onnx

        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.INT64:
            return None
        return [int(v) for v in onnx.numpy_helper.to_array(tensor).ravel()]

    def constant(self, name: str, values: Any) -> str:
        """Add a constant unless one of this name exists, and return its name."""
        import onnx

        if name not in self.constants:
            self.constants[name] = onnx.numpy_helper.from_array(np.asarray(values), name)
            self.graph.initializer.append(self.constants[name])
        return name

    def write(self) -> None:
        """Insert the replacements and remove unused nodes, initialisers and shapes."""
        nodes = []
        for node in self.graph.node:
            nodes += self.replacements.get(node.output[0], [node])
        needed, kept = set(self.outputs), []
        for node in reversed(nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))
        tensors = self.graph.initializer
        for i in reversed(range(len(tensors))):
            if tensors[i].name not in needed:
                del tensors[i]
        computed = {name for node in kept for name in node.output}
        shapes = [value for value in self.graph.value_info if value.name in computed]
        del self.graph.value_info[:]
        self.graph.value_info.extend(shapes)


def new_node(kind: str, inputs: list[str], *outputs: str, name: str = "", **attributes: Any) -> Any:
    """A node of ONNX's own domain, named after its first output by default."""
    import onnx

    return onnx.helper.make_node(kind, inputs, outputs, name=name or outputs[0], **attributes)
