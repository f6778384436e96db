"""Export to a folder with openvino_model.xml and .bin, for OpenVINO's CPU plugin.

The input is ``pixel_values`` float32 [batch, 3, H, W], or with ``uint8`` ``image`` uint8
[batch, H, W, 3]. The output is ``logits`` float32 [batch, classes]. The batch size is dynamic. The
graph's ``rt_info`` holds the metadata. An artefact always computes in its own precision; a
processor that does not support it is refused. The layers that int8 leaves in float are computed in
bf16 if the metadata say so and the processor has it, else in float32.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import FleetTables
from aoft_deploy.artefacts.exporter import Exporter, FleetSupport, FloatLayers
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.artefacts.verification import SOFTMAX
from aoft_deploy.errors import ArtefactError, SettingError
from aoft_exporters.graph.models import fleet_graph, plain_graph
from aoft_exporters.openvino import int8
from aoft_exporters.openvino.digest import DIGEST, ZEROS, restate, seal
from aoft_exporters.openvino.engine import OpenvinoFleet, load
from aoft_exporters.openvino.files import FLOAT_LAYERS, MARKER, SECTION, TASKS, WEIGHTS
from aoft_exporters.openvino.library import (
    check_arithmetic,
    computes_bf16,
    openvino_library,
)

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.tuning.multitask import FleetModel

__all__ = ["EXPORTER", "describe", "export", "export_fleet"]


def export(model: nn.Module, path: Path, spec: ExportSpec) -> None:
    """Write a plain model as a folder of OpenVINO's intermediate representation.

    Args:
        model: A merged model in evaluation mode; it is not changed.
        path: Folder to create.
        spec: Input form, normalisation, metadata, precision, and calibration images for int8.

    Raises:
        MissingExtraError: OpenVINO is not installed, or NNCF for int8.
        SettingError: The processor does not compute in bf16, or int8 has no calibration images.
        AttachError: ``uint8`` is set, but the model has no plain patch embedding.
    """
    _write(
        path,
        spec,
        lambda: plain_graph(model, spec, separate=True),
        _images(spec),
    )
    seal(path)


def export_fleet(model: FleetModel, path: Path, spec: ExportSpec, tables: FleetTables) -> None:
    """Write a fleet as such a folder, with the tasks' tables in a safetensors file.

    Args:
        model: The model that all tasks share; it is not changed.
        path: Folder to create.
        spec: Input form, metadata, precision, and calibration images for int8; ``uint8`` is not
            supported.
        tables: The tasks' tables.

    Raises:
        MissingExtraError: OpenVINO is not installed, or NNCF for int8.
        SettingError: The processor does not compute in bf16, int8 has no calibration images, or
            ``uint8`` is set.
    """
    from safetensors.numpy import save_file

    tasks = len(tables.count)
    image = _images(spec)

    def sample(index: int) -> dict[str, NDArray[Any]]:
        return {"pixel_values": image(index), "task": np.array([index % tasks]), **tables.by_name()}

    _write(path, spec, lambda: fleet_graph(model, spec, tables, separate=True), sample)
    save_file(
        {name: np.ascontiguousarray(table) for name, table in tables.by_name().items()},
        path / TASKS,
    )
    seal(path)


def _images(spec: ExportSpec) -> Callable[[int], NDArray[Any]]:
    """A function that returns one calibration image as a batch of one."""
    if spec.precision == "int8" and spec.calibration is None:
        raise SettingError("int8 of openvino needs calibration images: give them with `calibrate`.")

    def image(index: int) -> NDArray[Any]:
        assert spec.calibration is not None
        return spec.input.prepare(spec.calibration.pixels[index : index + 1])

    return image


def _write(
    path: Path, spec: ExportSpec, graph_of: Callable[[], Any], sample: Callable[[int], Any]
) -> None:
    """Convert an ONNX graph to the spec's precision and write it with its metadata."""
    openvino = openvino_library()
    check_arithmetic(openvino.Core(), spec.precision)
    from onnx import save

    if spec.precision == "int8":
        int8.require()
    path.mkdir()
    texts = {**spec.metadata, "precision": spec.precision, DIGEST: ZEROS}
    intermediate = path / "graph"
    intermediate.mkdir()
    graph_file = intermediate / "graph.onnx"  # with external weights, which may exceed 2 GiB
    save(graph_of(), graph_file, save_as_external_data=True, location="weights")
    graph = openvino.convert_model(graph_file)
    _renumber(graph)
    if spec.precision == "int8" and spec.calibration is not None:
        info, count = ArtefactInfo(spec.metadata), len(spec.calibration.pixels)
        classes = (
            [*info.tasks.values()]
            if info.is_fleet
            else [info.classes if "classes" in info.texts else SOFTMAX]
        )
        least = spec.calibration.min_agreement
        texts[FLOAT_LAYERS] = "fp32"
        graph, float_products = int8.quantised(graph, count, sample, classes, least)
        _renumber(graph)
        if float_products:
            texts["left_in_float"] = json.dumps(float_products)
    for name, text in texts.items():
        graph.set_rt_info(text, [SECTION, name])
    openvino.save_model(graph, path / MARKER, compress_to_fp16=False)
    del graph  # it may map the weights' file into memory
    shutil.rmtree(intermediate)


LEAST_FLOPS = 20 * 10**9
"""FLOPs of an image from which bf16 makes the layers that int8 leaves in float faster.

These layers are limited by memory, whose traffic bf16 halves. A smaller model's activations stay in
the cache, and their conversion costs what it saves. ViT-B/16 has 35 · 10⁹, ViT-S/16 9 · 10⁹."""


def _is_bf16_faster(flops: int) -> bool:
    return flops >= LEAST_FLOPS and computes_bf16(openvino_library().Core())


def _state_float_layers(path: Path, precision: str) -> None:
    restate(path, FLOAT_LAYERS, precision)


def _renumber(graph: Any) -> None:
    """Number the generated node names by position, so that the same input gives the same files.

    OpenVINO's own counter runs across the whole process.
    """
    for i, node in enumerate(graph.get_ordered_ops()):
        generated = re.fullmatch(r"([A-Z][A-Za-z0-9]*)_\d+", node.get_friendly_name())
        if generated:
            node.set_friendly_name(f"{generated[1]}_{i}")


def describe(path: Path) -> dict[str, Any]:
    """Operators and metadata of a folder, read from its XML.

    Raises:
        ArtefactError: The folder holds no OpenVINO model.
    """
    from xml.etree import ElementTree

    try:
        root = ElementTree.parse(path / MARKER).getroot()
        (path / WEIGHTS).stat()
    except (OSError, ElementTree.ParseError) as error:
        raise ArtefactError(f"{path} is no OpenVINO model ({error}).") from error
    operators = Counter(layer.get("type", "") for layer in root.iterfind("layers/layer"))
    section = root.find(f"rt_info/{SECTION}")
    metadata = {} if section is None else {entry.tag: entry.get("value", "") for entry in section}
    return {
        "kind": "OpenVINO artefact",
        "operators": dict(operators.most_common()),
        **ArtefactInfo(metadata).entries(),
    }


EXPORTER = Exporter(
    name="openvino",
    suffix=".openvino",
    marker=MARKER,
    precisions=("fp32", "bf16", "int8"),
    engines=("openvino",),
    tolerance=5e-5,
    export=export,
    load=load,
    describe=describe,
    platform="openvino",
    calibrated=("int8",),
    float_layers=FloatLayers(("int8",), "bf16", _is_bf16_faster, _state_float_layers),
    fleet=FleetSupport(("mixed", "folded"), export_fleet, OpenvinoFleet),
)
