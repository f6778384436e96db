"""Files of models: the bytes of a protobuf library, written and read without parsing weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from aoft_deploy.artefacts.onnx_metadata import checked_metadata, digest_entry
from aoft_deploy.errors import ArtefactError
from aoft_exporters.graph.fleet_tables import FLEET_TABLES
from aoft_exporters.onnx import exporter
from aoft_exporters.onnx.fleet_file import fleet_file
from aoft_exporters.onnx.model_file import stored_bytes, write_model
from aoft_exporters.onnx.sessions import session

SEAL = len(digest_entry(64 * "0"))


def model(rows: int) -> Any:
    """x · w + 1, with w of ``rows`` × 3 values and an int64 constant, complete."""
    values = np.random.default_rng(rows).normal(size=(rows, 3)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    nodes += [helper.make_node("Add", ["y", "one"], ["z"]), helper.make_node("Shape", ["k"], ["s"])]
    tensors = [
        numpy_helper.from_array(values, "w"),
        numpy_helper.from_array(np.array(1, np.float32), "one"),
    ]
    tensors.append(numpy_helper.from_array(np.arange(3), "k"))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", rows])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 3])],
        tensors,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    helper.set_model_props(made, {"format": "test", "name": "zürich"})
    return made


def emptied(made: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The model without the values of w, and these, stored in the other order in memory."""
    light = type(made)()
    light.CopyFrom(made)
    values = numpy_helper.to_array(light.graph.initializer[0])
    light.graph.initializer[0].ClearField("raw_data")
    return light, {"w": np.asfortranarray(values)}


@pytest.mark.parametrize("rows", [1, 5, 400, 50_000])
def test_a_models_file_has_the_bytes_of_protobuf(rows: int, tmp_path: Path) -> None:
    complete = model(rows)
    write_model(*emptied(complete), tmp_path / "beside.onnx")
    write_model(complete, {}, tmp_path / "inside.onnx")
    content = (tmp_path / "beside.onnx").read_bytes()
    assert content == (tmp_path / "inside.onnx").read_bytes()
    assert content[:-SEAL] == complete.SerializeToString()
    assert checked_metadata(tmp_path / "beside.onnx")["name"] == "zürich"
    assert stored_bytes(complete) == rows * 12 + 4 + 24


def test_a_weight_of_another_size_and_one_given_twice_are_refused(tmp_path: Path) -> None:
    light, weights = emptied(model(5))
    for proto, values in ((light, weights["w"][1:]), (light, weights["w"].astype(np.float64))):
        with pytest.raises(ValueError, match="w has another size than its weight"):
            write_model(proto, {"w": values}, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="w has another size than its weight"):
        write_model(model(5), weights, tmp_path / "a.onnx")


@pytest.mark.parametrize("rows", [5, 50_000])
@pytest.mark.parametrize("fault", ["unknown operator", "unknown input", "computed twice"])
def test_a_graph_that_is_not_valid_is_refused_without_reading_weights(
    fault: str, rows: int, tmp_path: Path
) -> None:
    light, weights = emptied(model(rows))
    if fault == "unknown operator":
        light.graph.node[0].op_type = "MatMulX"
    elif fault == "unknown input":
        light.graph.node[0].input[1] = "v"
    else:
        light.graph.node[1].output[0] = "y"
    with pytest.raises(onnx.checker.ValidationError):
        write_model(light, weights, tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_the_checker_sees_no_large_weight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checked = list[int]()
    monkeypatch.setattr(onnx.checker, "check_model", lambda m: checked.append(m.ByteSize()))
    write_model(model(50_000), {}, tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").stat().st_size > 600_000
    assert len(checked) == 1 and checked[0] < 1000


@pytest.mark.parametrize("system", ["linux", "another"])
def test_a_fleets_file_becomes_a_graph_that_takes_the_tables(
    system: str, fleet_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = onnx.load(fleet_artefact)
    stored = {t.name: t for t in expected.graph.initializer if t.name in FLEET_TABLES}
    for name, axis in FLEET_TABLES.items():
        expected.graph.initializer.remove(stored[name])
        shape = [axis, *stored[name].dims[1:]]
        value = helper.make_tensor_value_info(name, stored[name].data_type, shape)
        expected.graph.input.append(value)
    monkeypatch.setattr("sys.platform", system)
    descriptors = len(os.listdir("/proc/self/fd"))
    with fleet_file(fleet_artefact) as (graph, tables):
        assert isinstance(graph, bytes) is not (system == "linux")
        content = graph if isinstance(graph, bytes) else graph.read_bytes()
        opened = session(graph, 1, "cpu", fleet_artefact)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert onnx.load_from_string(content) == expected
    for name, table in tables.by_name().items():
        np.testing.assert_array_equal(table, onnx.numpy_helper.to_array(stored[name]))
    assert {"pixel_values", "task", *FLEET_TABLES} == {each.name for each in opened.get_inputs()}
    assert opened._model_bytes is None  # else the session would keep the whole file in memory


def test_a_file_that_is_no_fleet_is_refused(
    artefact: Path, fleet_artefact: Path, tmp_path: Path
) -> None:
    def opened(path: Path) -> None:
        with fleet_file(path):
            pytest.fail("it was opened")

    with pytest.raises(ArtefactError, match="is no fleet: export the checkpoints as a fleet first"):
        opened(artefact)
    content, path = fleet_artefact.read_bytes(), tmp_path / "fleet.onnx"
    for damaged in (content[:1000], content + content, b""):
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError, match="is no ONNX model"):
            opened(path)
    with pytest.raises(ArtefactError, match="cannot be read"):
        opened(tmp_path / "missing.onnx")


def test_an_export_makes_no_message_of_all_weights(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight would be in memory twice more, and be checked by copying it."""
    from aoft_deploy.checkpoints.backbone_source import BackboneSource
    from aoft_deploy.export.merged import export_merged

    sizes = list[tuple[int, int]]()

    def recording(proto: Any, weights: dict[str, np.ndarray], path: Path) -> None:
        sizes.append((proto.ByteSize(), sum(array.nbytes for array in weights.values())))
        write_model(proto, weights, path)

    monkeypatch.setattr(exporter, "write_model", recording)
    export_merged(
        checkpoint, tmp_path / "a.onnx", backbone=BackboneSource(weights=backbone_weights)
    )
    ((message, weights),) = sizes
    assert weights > 70_000  # 19,000 parameters
    assert message + weights + SEAL < (tmp_path / "a.onnx").stat().st_size + 5_000
    assert message < 20_000
