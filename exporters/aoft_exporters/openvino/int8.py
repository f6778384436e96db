"""Quantise an OpenVINO graph to int8 with NNCF's post-training quantisation.

Weights have a scale for each output channel. Each activation has one range, estimated from
calibration images. The patch embedding, the classifier, LayerNorm and softmax stay in float.
Weights use 7 bits, since products of 8 bits saturate on processors without VNNI, whose results
would differ from those of the machine that verified the artefact.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.verification import Bar, Comparison
from aoft_deploy.classes import Classes
from aoft_deploy.errors import optional_imports

__all__ = ["agreement", "quantised", "require"]

RANKED = 8
"""Number of images on which the quantisation error of each product is measured."""


def require() -> Any:
    """Import NNCF with telemetry disabled.

    Raises:
        MissingExtraError: NNCF is not installed.
    """
    from aoft_exporters.openvino.library import without_telemetry

    with optional_imports(), without_telemetry(), _quiet():
        import nncf
    return nncf


def quantised(
    graph: Any,
    images: int,
    inputs: Callable[[int], Any],
    classes: Sequence[Classes],
    min_agreement: float = 0.0,
) -> tuple[Any, list[str]]:
    """Convert the linear maps and attention products of a graph to int8.

    If too few images keep their answers, the products with the largest error are restored to
    float32.

    Args:
        graph: An OpenVINO model in float32.
        images: Number of calibration images.
        inputs: Returns the graph's inputs for the image of an index.
        classes: The classes of the tasks; images have these tasks in turn.
        min_agreement: Smallest allowed agreement with the graph; see ``Comparison.agreement``.

    Returns:
        A new OpenVINO model and the names of its restored products. The result is deterministic.

    Raises:
        MissingExtraError: NNCF is not installed.
    """
    nncf = require()
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    with _quiet():
        nncf.set_log_level(40)
        int8_graph = nncf.quantize(
            graph,
            nncf.Dataset(range(images), inputs),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=images,
            ignored_scope=nncf.IgnoredScope(names=_kept_in_float(graph)),
            advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE),
        )
    samples = [*map(inputs, range(images))]
    return _restored_until(graph, int8_graph, samples, classes, min_agreement)


def _restored_until(
    graph: Any,
    int8_graph: Any,
    samples: list[Any],
    classes: Sequence[Classes],
    min_agreement: float,
) -> tuple[Any, list[str]]:
    """Restore 1, 2, 4, … products to float32 until the agreement is reached.

    If no number of products suffices, the graph stays fully quantised.
    """
    if not min_agreement:
        return int8_graph, []
    expected = _logits(graph, samples)
    if agreement(_logits(int8_graph, samples), expected, classes) >= min_agreement:
        return int8_graph, []
    subset = samples[:: max(1, len(samples) // RANKED)][:RANKED]
    exact = expected[:: max(1, len(samples) // RANKED)][:RANKED]
    remaining_error = {  # if this product alone is restored
        name: float(np.square(_logits(_restored(int8_graph, [name]), subset) - exact).sum())
        for name in _products(int8_graph)
    }
    ranked = sorted(remaining_error, key=lambda name: remaining_error[name])
    count = 1
    while count < 2 * len(ranked):
        result = _restored(int8_graph, ranked[:count])
        if agreement(_logits(result, samples), expected, classes) >= min_agreement:
            return result, sorted(ranked[:count])
        count *= 2
    return int8_graph, []


def _products(int8_graph: Any) -> list[str]:
    """Names of the products with quantised inputs."""
    return [
        node.get_friendly_name()
        for node in int8_graph.get_ordered_ops()
        if node.get_type_name() in ("MatMul", "Convolution")
        and any(_quantiser(port) is not None for port in node.inputs())
    ]


def _quantiser(port: Any) -> Any:
    """The node that quantises an input of a product; None if the input is in float32."""
    node = port.get_source_output().get_node()
    return node if node.get_type_name() == "FakeQuantize" else None


def _restored(int8_graph: Any, names: list[str]) -> Any:
    """A copy of a quantised graph with the inputs of some products in float32."""
    copy, restored = int8_graph.clone(), set(names)
    for node in copy.get_ordered_ops():
        if node.get_friendly_name() in restored:
            for port in node.inputs():
                quantiser = _quantiser(port)
                if quantiser is not None:
                    port.replace_source_output(quantiser.input_value(0))
    copy.validate_nodes_and_infer_types()
    return copy


def _logits(graph: Any, samples: list[Any]) -> NDArray[np.float32]:
    """Logits of samples, each a batch of one; unquantised operators run in float32."""
    openvino: Any = importlib.import_module("openvino")
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    rows = [np.array(compiled(sample)[compiled.output(0)][0]) for sample in samples]
    width = max(map(len, rows))  # a fleet's tasks have different numbers of classes
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


def agreement(
    logits: NDArray[np.float32], expected: NDArray[np.float32], classes: Sequence[Classes]
) -> float:
    """The agreement of logits with the expected ones, (images, classes); see ``Comparison``.

    Args:
        logits: Logits of an artefact.
        expected: Logits of its model.
        classes: The classes of the tasks; images have these tasks in turn.
    """
    comparison = Comparison(float(np.abs(expected).max()), Bar(float("inf")))
    for index, row in enumerate(logits):
        own = classes[index % len(classes)]
        width = len(own) or None  # unnamed classes
        comparison.add(row[None, :width], expected[index, None, :width], 1, own)
    return comparison.agreement


def _kept_in_float(graph: Any) -> list[str]:
    """Names of the nodes that are never quantised.

    These are the patch embedding, the classifier and products with task parameters. The patch
    embedding is 1 % of a ViT's arithmetic, and quantising it causes the largest error of all
    layers: it rounds the pixels themselves.
    """
    kinds = ((node.get_type_name(), node.get_friendly_name()) for node in graph.get_ordered_ops())
    first = [name for kind, name in kinds if kind == "Convolution"][:1]
    return [*first, *_classifier(graph), *_task_products(graph)]


def _task_products(graph: Any) -> list[str]:
    """Names of a fleet's products with task parameters."""
    depends: dict[str, frozenset[str]] = {}
    names = []
    for node in graph.get_ordered_ops():
        kind, sources = node.get_type_name(), [v.get_node() for v in node.input_values()]
        own = {node.get_friendly_name()} if kind == "Parameter" else set[str]()
        sides = [depends[source.get_friendly_name()] for source in sources]
        depends[node.get_friendly_name()] = frozenset(own.union(*sides))
        if kind == "MatMul" and any(side and "pixel_values" not in side for side in sides):
            names.append(node.get_friendly_name())
    return names


def _classifier(graph: Any) -> list[str]:
    """Name of the MatMul that computes the logits; empty if there is none."""
    node = graph.outputs[0].get_node()
    while node.get_type_name() in ("Result", "Add", "Reshape", "Convert"):
        node = node.input_value(0).get_node()
    return [node.get_friendly_name()] if node.get_type_name() == "MatMul" else []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice off the terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
