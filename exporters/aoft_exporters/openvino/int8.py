"""8-bit integers for an OpenVINO graph, by NNCF's post-training quantisation.

Weights get a scale for each output channel, activations one range each, learnt from images; the
patch embedding, the classifier, LayerNorm and softmax stay in float32. Weights take 7 bits, so that
processors without VNNI, whose products would saturate, answer as the machine that verified.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.errors import MissingExtraError

__all__ = ["quantised", "require"]

RANKED = 8
"""Images that the harm of each product is measured on."""


def require() -> Any:
    """NNCF, which sends no report of its use.

    Raises:
        MissingExtraError: It is not installed.
    """
    from aoft_exporters.openvino.library import without_telemetry

    try:
        with without_telemetry(), _quiet():
            import nncf
    except ImportError as error:
        raise MissingExtraError("nncf", "openvino") from error
    return nncf


def quantised(
    graph: Any, images: int, inputs: Callable[[int], Any], min_agreement: float = 0.0
) -> tuple[Any, list[str]]:
    """The graph with its linear maps and attention products in int8.

    If too few of the images keep their top class, the products that harm most go back to float32.

    Args:
        graph: An OpenVINO model in float32.
        images: How many there are to calibrate with.
        inputs: What the graph takes for an image.
        min_agreement: Share of the images that must keep their top class.

    Returns:
        A new OpenVINO model, the same for the same input, and the names of the products that went
        back to float32.

    Raises:
        MissingExtraError: NNCF is not installed.
    """
    nncf = require()
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    with _quiet():
        nncf.set_log_level(40)
        small = nncf.quantize(
            graph,
            nncf.Dataset(range(images), inputs),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=images,
            ignored_scope=nncf.IgnoredScope(names=_kept_in_float(graph)),
            advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE),
        )
    return _restored_until(graph, small, [*map(inputs, range(images))], min_agreement)


def _restored_until(
    graph: Any, small: Any, samples: list[Any], min_agreement: float
) -> tuple[Any, list[str]]:
    """The quantised graph with as few products in float32 as the agreement takes, by doubling."""
    if not min_agreement:
        return small, []
    wanted = _logits(graph, samples)
    if _agreement(_logits(small, samples), wanted) >= min_agreement:
        return small, []
    few = samples[:: max(1, len(samples) // RANKED)][:RANKED]
    exact = wanted[:: max(1, len(samples) // RANKED)][:RANKED]
    harm = {
        name: float(np.square(_logits(_restored(small, [name]), few) - exact).sum())
        for name in _products(small)
    }
    ranked = sorted(harm, key=lambda name: harm[name])  # least is left when the worst goes back
    count = 1
    while count < 2 * len(ranked):
        result = _restored(small, ranked[:count])
        if _agreement(_logits(result, samples), wanted) >= min_agreement:
            return result, sorted(ranked[:count])
        count *= 2
    return small, []


def _products(small: Any) -> list[str]:
    """Names of the products that take quantised numbers."""
    return [
        node.get_friendly_name()
        for node in small.get_ordered_ops()
        if node.get_type_name() in ("MatMul", "Convolution")
        and any(_quantiser(port) is not None for port in node.inputs())
    ]


def _quantiser(port: Any) -> Any:
    """The node that quantises what a product takes; None if it takes it in float32."""
    node = port.get_source_output().get_node()
    return node if node.get_type_name() == "FakeQuantize" else None


def _restored(small: Any, names: list[str]) -> Any:
    """A copy of a quantised graph in which some products take what was before quantisation."""
    copy, chosen = small.clone(), set(names)
    for node in copy.get_ordered_ops():
        if node.get_friendly_name() in chosen:
            for port in node.inputs():
                quantiser = _quantiser(port)
                if quantiser is not None:
                    port.replace_source_output(quantiser.input_value(0))
    copy.validate_nodes_and_infer_types()
    return copy


def _logits(graph: Any, samples: list[Any]) -> NDArray[np.float32]:
    """Of samples, each a batch of one; what is not quantised is computed in float32."""
    openvino: Any = importlib.import_module("openvino")
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    rows = [np.array(compiled(sample)[compiled.output(0)][0]) for sample in samples]
    width = max(map(len, rows))  # a fleet's tasks have different numbers of classes
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


def _agreement(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float((found.argmax(1) == wanted.argmax(1)).mean())


def _kept_in_float(graph: Any) -> list[str]:
    """Names of what is never quantised: the first convolution, the classifier, tasks' own products.

    The patch embedding is 1 % of a ViT's arithmetic, and of all layers the one that harms most:
    it rounds the pixels themselves.
    """
    kinds = ((node.get_type_name(), node.get_friendly_name()) for node in graph.get_ordered_ops())
    first = [name for kind, name in kinds if kind == "Convolution"][:1]
    return [*first, *_classifier(graph), *_tasks_own(graph)]


def _tasks_own(graph: Any) -> list[str]:
    """Names of the products of a fleet that take a task's own numbers, which stay in float32."""
    depends: dict[str, frozenset[str]] = {}
    names = []
    for node in graph.get_ordered_ops():
        kind, given = node.get_type_name(), [value.get_node() for value in node.input_values()]
        own = {node.get_friendly_name()} if kind == "Parameter" else set[str]()
        sides = [depends[source.get_friendly_name()] for source in given]
        depends[node.get_friendly_name()] = frozenset(own.union(*sides))
        if kind == "MatMul" and any(side and "pixel_values" not in side for side in sides):
            names.append(node.get_friendly_name())
    return names


def _classifier(graph: Any) -> list[str]:
    """Name of the linear map that makes the logits, if it is one."""
    node = graph.outputs[0].get_node()
    while node.get_type_name() in ("Result", "Add", "Reshape", "Convert"):
        node = node.input_value(0).get_node()
    return [node.get_friendly_name()] if node.get_type_name() == "MatMul" else []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice off the terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
