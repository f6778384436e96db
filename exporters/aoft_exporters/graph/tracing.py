"""Trace a PyTorch model to an ONNX graph with timm's parameter names."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aoft_exporters.graph.attention_tracing import attention_as_one_node

if TYPE_CHECKING:
    from torch import nn

__all__ = ["OPSET", "TRANSPOSED", "Traced", "plain_name", "trace"]

OPSET = 20
"""First opset with both LayerNormalization and Gelu as operators; current runtimes support it."""

TRANSPOSED = "transposed"
"""``doc_string`` of an initialiser that is stored transposed."""


class Traced(NamedTuple):
    """A traced graph.

    Attributes:
        proto: The ONNX protobuf.
        used: Names of the parameters and buffers that the graph's output depends on.
    """

    proto: Any
    used: frozenset[str]


def plain_name(name: str) -> str:
    """Name of a parameter in timm, without the prefixes of this project's wrappers."""
    stripped = name.removeprefix("model.").removeprefix("backbone.")
    return stripped.replace(".base.", ".")  # the frozen layer of a folded fleet


def trace(
    model: nn.Module, examples: Mapping[str, tuple[Any, str]], also: Sequence[str] = ()
) -> Traced:
    """Trace a model to an optimised ONNX protobuf with timm's parameter names.

    Attention is written as nodes that ``attention_lowering.lower`` replaces.

    Args:
        model: A model in evaluation mode.
        examples: An example of each input, and the name of its first axis, which is dynamic.
        also: Names of the outputs that the model computes after ``logits``.
    """
    import torch
    from onnxscript import optimizer

    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad(), attention_as_one_node():
        warnings.simplefilter("ignore")  # the exporter warns about its own deprecations
        program = torch.onnx.export(
            model,
            tuple(example for example, _ in examples.values()),
            dynamo=True,
            input_names=list(examples),
            output_names=["logits", *also],
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
        initializer.name = plain_name(str(initializer.name))
    proto = program.model_proto
    names = {initializer.name for initializer in proto.graph.initializer}
    kept = [info for info in proto.graph.value_info if info.name not in names]
    del proto.graph.value_info[:]  # shapes of initialisers break ONNX Runtime's quantiser
    proto.graph.value_info.extend(kept)
    for entry in (*proto.graph.node, *proto.graph.value_info):
        del entry.metadata_props[:]  # stack traces with paths of this machine
    return Traced(proto, _used(program.exported_program))


def _used(program: Any) -> frozenset[str]:
    """Names of the parameters and buffers that an operation uses."""
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return frozenset(
        plain_name(targets[node.name])
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in targets and node.users
    )


def _store_transposed(graph: Any) -> None:
    """Replace transposes of weights with weights that are stored transposed.

    Constant folding does the same, but renames every weight.
    """
    import onnx_ir

    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.name not in graph.initializers:
            continue
        order = node.attributes["perm"].as_ints()
        uses = [use.node for use in weight.uses()]
        if any(u.op_type != "Transpose" or u.attributes["perm"].as_ints() != order for u in uses):
            continue
        transposed = weight.const_value.numpy().transpose(order)
        note = TRANSPOSED if tuple(order) == (1, 0) else None
        contiguous = np.ascontiguousarray(transposed)
        weight.const_value = onnx_ir.tensor(contiguous, name=weight.name, doc_string=note)
        weight.shape = weight.const_value.shape
        for use in uses:
            use.outputs[0].replace_all_uses_with(weight)
        graph.remove(uses, safe=True)
