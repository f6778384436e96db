"""Compute q, k and v by three linear maps instead of a packed one.

A runtime that reads the heads in place from the output of each map saves a pass over qkv. In a
fleet, a map without task parameters keeps its bias and saves the addition of the thin product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from aoft_exporters.graph.linked_graph import LinkedGraph, new_node

__all__ = ["separate_qkv"]

LETTERS = "qkv"
ALL = frozenset(range(len(LETTERS)))


def separate_qkv(graph: LinkedGraph, packed: str, prefix: str) -> None:
    """Compute q, k and v by maps of their own, named ``prefix/q``, ``prefix/k`` and ``prefix/v``.

    The packed qkv must be x W + b with constants W and b or, in a fleet, x W + U V, where U V is
    the thin product of ``mix_linear``. Other graphs stay as they are.

    Args:
        graph: The graph; its replacements are changed.
        packed: Name of the packed qkv, [batch, tokens, 3 · columns].
        prefix: Prefix of the new values.
    """
    add = graph.producer(packed, "Add")
    products = [graph.producer(name, "MatMul") for name in add.input] if add else []
    product = next((p for p in products if p and p.input[1] in graph.constants), None)
    if product is None or len(graph.consumers[product.output[0]]) != 1:
        return
    (name,) = (name for name in add.input if name != product.output[0])
    summand = _Summand.of(graph, name, graph.constants[product.input[1]].dims[1] // len(LETTERS))
    if summand is None:
        return
    nodes = summand.factors(prefix)
    for i, letter in enumerate(LETTERS):
        result = f"{prefix}/{letter}"
        terms = [_third(graph, summand.bias, i)] if summand.bias else []
        if i in summand.reached:
            terms.append(f"{result}_thin")
            nodes.append(
                new_node("MatMul", [f"{prefix}/inner", f"{prefix}/outer_{letter}"], terms[-1])
            )
        weight = _third(graph, product.input[1], i)
        names = [f"{result}_{step}" for step in ("product", "biased")[: len(terms)]] + [result]
        nodes.append(new_node("MatMul", [product.input[0], weight], names[0]))
        for value, term, total in zip(names, terms, names[1:], strict=False):
            nodes.append(new_node("Add", [value, term], total))
    before = graph.replacements.get(add.output[0], [add])
    graph.replacements[add.output[0]] = [*before, *nodes]


class _Summand(NamedTuple):
    """What is added to x W: the bias, and in a fleet the thin product U V.

    Attributes:
        bias: Name of the constant bias, (3 · columns,); empty without one.
        inner: Names of the blocks of U's columns, [batch, tokens, …].
        outer: Names of the blocks of V's rows, [batch, …, 3 · columns].
        reached: Which thirds of V may contain anything but zeros.
    """

    bias: str
    inner: list[str]
    outer: list[str]
    reached: frozenset[int]

    @classmethod
    def of(cls, graph: LinkedGraph, name: str, columns: int) -> _Summand | None:
        """The summand of this name; None if it is neither a constant nor a thin product."""
        if name in graph.constants:
            return cls(name, [], [], frozenset())
        product = graph.producer(name, "MatMul")
        if product is None:
            return None
        inner, outer = _blocks(graph, product.input[0], -1), _blocks(graph, product.input[1], -2)
        if len(inner) != len(outer):
            inner, outer = [product.input[0]], [product.input[1]]
        bias = ""
        if len(inner) > 1 and _is_one(graph, inner[-1]):
            bias = _expanded(graph, outer[-1])
            inner, outer = (inner[:-1], outer[:-1]) if bias else (inner, outer)
        reached = frozenset[int]().union(*(_reached(graph, block, columns) for block in outer))
        return cls(bias, inner, outer, reached)

    def factors(self, prefix: str) -> list[Any]:
        """The nodes that compute U, ``prefix/inner``, and V's thirds, ``prefix/outer_q`` and on."""
        if not self.reached:
            return []
        thirds = [f"{prefix}/outer_{letter}" for letter in LETTERS]
        return [
            new_node("Concat", self.inner, f"{prefix}/inner", axis=-1),
            new_node("Concat", self.outer, f"{prefix}/outer", axis=-2),
            new_node("Split", [f"{prefix}/outer"], *thirds, axis=-1, num_outputs=len(LETTERS)),
        ]


def _third(graph: LinkedGraph, name: str, index: int) -> str:
    """Name of a third of a constant's columns, which becomes a constant."""
    import onnx

    values = onnx.numpy_helper.to_array(graph.constants[name])
    third = np.split(values, len(LETTERS), axis=-1)[index]
    return graph.constant(f"{name}.{LETTERS[index]}", np.ascontiguousarray(third))


def _blocks(graph: LinkedGraph, name: str, axis: int) -> list[str]:
    """Names of the values that a Concat along an axis joins; the value itself if there is none."""
    concat = graph.producer(name, "Concat")
    return list(concat.input) if concat and concat.attribute[0].i == axis else [name]


def _expanded(graph: LinkedGraph, name: str) -> str:
    """Name of the constant that a value repeats; empty if it is something else."""
    expand = graph.producer(name, "Expand")
    return str(expand.input[0]) if expand and expand.input[0] in graph.constants else ""


def _is_one(graph: LinkedGraph, name: str) -> bool:
    """Whether all elements of a value are the constant 1."""
    import onnx

    constant = graph.constants.get(_expanded(graph, name))
    return constant is not None and bool((onnx.numpy_helper.to_array(constant) == 1).all())


def _reached(graph: LinkedGraph, name: str, columns: int) -> frozenset[int]:
    """Which thirds of a value's last axis, 3 · columns, may contain anything but zeros."""
    node: Any = graph.producers.get(name)
    kind = node.op_type if node is not None else ""
    if kind == "Add" or (kind == "Concat" and node.attribute[0].i == -2):
        return frozenset().union(*(_reached(graph, part, columns) for part in node.input))
    pads = graph.integers(node.input[1]) if kind == "Pad" and len(node.input) == 2 else None
    if not pads:
        return ALL
    before, after = pads[len(pads) // 2 - 1], pads[-1]
    if not before and not after:
        return _reached(graph, node.input[0], columns)
    first, last = before, len(LETTERS) * columns - after - 1
    return frozenset(range(first // columns, last // columns + 1))
