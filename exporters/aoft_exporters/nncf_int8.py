"""8-bit integers for an OpenVINO graph, by NNCF's post-training quantisation.

Weights get a scale for each output channel, activations one range each, learnt from images; the
classifier, LayerNorm and softmax stay in float32. Weights take 7 bits, so that processors without
VNNI, whose products would saturate, answer as the machine that verified.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

from aoft_deploy.errors import MissingExtraError

__all__ = ["quantised", "require"]


def require() -> Any:
    """NNCF, which sends no report of its use.

    Raises:
        MissingExtraError: It is not installed.
    """
    from aoft_exporters.openvino import without_telemetry

    try:
        with without_telemetry(), _quiet():
            import nncf
    except ImportError as error:
        raise MissingExtraError("nncf", "openvino") from error
    return nncf


def quantised(graph: Any, images: int, inputs: Callable[[int], Any]) -> Any:
    """The graph with its linear maps and attention products in int8.

    Args:
        graph: An OpenVINO model in float32.
        images: How many there are to calibrate with.
        inputs: What the graph takes for an image.

    Returns:
        A new OpenVINO model; the same input gives the same one.

    Raises:
        MissingExtraError: NNCF is not installed.
    """
    nncf = require()
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    with _quiet():
        nncf.set_log_level(40)
        return nncf.quantize(
            graph,
            nncf.Dataset(range(images), inputs),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=images,
            ignored_scope=nncf.IgnoredScope(names=[*_classifier(graph), *_tasks_own(graph)]),
            advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE),
        )


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
