"""Metadata of ONNX files that are damaged or refer to other files."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aoft_deploy.artefacts import onnx_metadata
from aoft_deploy.artefacts.onnx_metadata import checked_metadata, checking, read_metadata
from aoft_deploy.errors import ArtefactError


def test_the_metadata_equal_those_that_onnx_reads(artefact: Path) -> None:
    assert read_metadata(artefact) == {
        entry.key: entry.value for entry in onnx.load(artefact).metadata_props
    }


def make_external(graph: onnx.GraphProto) -> None:
    tensor = graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location="../../../etc/passwd")
    tensor.ClearField("raw_data")


@pytest.mark.parametrize("place", ["graph", "attribute", "subgraph", "function", "sparse"])
def test_an_onnx_file_with_external_data_is_refused(
    artefact: Path, tmp_path: Path, place: str
) -> None:
    proto = onnx.load(artefact)
    inner = onnx.GraphProto()
    inner.initializer.append(proto.graph.initializer[0])
    make_external(inner)
    if place == "graph":
        make_external(proto.graph)
    elif place == "attribute":
        node = proto.graph.node.add(op_type="Constant")
        node.attribute.append(onnx.helper.make_attribute("value", inner.initializer[0]))
    elif place == "subgraph":
        node = proto.graph.node.add(op_type="If")
        node.attribute.append(onnx.helper.make_attribute("then_branch", inner))
    elif place == "function":
        node = proto.functions.add(name="f").node.add(op_type="Constant")
        node.attribute.append(onnx.helper.make_attribute("value", inner.initializer[0]))
    else:
        proto.graph.sparse_initializer.add().values.CopyFrom(inner.initializer[0])
    path = tmp_path / "outside.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ArtefactError, match="keeps weights in other files"):
        read_metadata(path)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_damaged_onnx_file_is_refused(artefact: Path, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(artefact.read_bytes()[:cut])
    with pytest.raises(ArtefactError, match="no ONNX model, or a damaged one"):
        read_metadata(path)
    with pytest.raises(ArtefactError, match="There is no file"):
        read_metadata(tmp_path / "none.onnx")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_corrupted_onnx_file_is_read_or_refused(
    data: st.DataObject, artefact: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(artefact.read_bytes()[:4000])
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "distorted.onnx"
    path.write_bytes(content)
    try:
        read_metadata(path)
    except ArtefactError:
        pass


def test_metadata_are_read_in_large_pieces(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, pread = list[int](), os.pread

    def counting(file: int, size: int, start: int) -> bytes:
        reads.append(size)
        return pread(file, size, start)

    monkeypatch.setattr("aoft_deploy.artefacts.protobuf.os.pread", counting)
    read_metadata(artefact)
    assert 0 < len(reads) < len(onnx.load(artefact).graph.node) / 2


def test_a_digest_is_computed_while_the_file_is_opened(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest before or after the block would wait for the other one."""
    begun, ended, digest = threading.Event(), threading.Event(), onnx_metadata._file_digest

    def meeting(*given: Any) -> str:
        begun.set()
        assert ended.wait(20)
        return digest(*given)

    monkeypatch.setattr(onnx_metadata, "_file_digest", meeting)
    with checking(artefact) as metadata:
        assert begun.wait(20)
        ended.set()
    assert metadata == checked_metadata(artefact)


def test_a_wrong_digest_counts_more_than_the_error_that_it_explains(
    artefact: Path, tmp_path: Path
) -> None:
    path = tmp_path / "task.onnx"
    shutil.copy(artefact, path)
    with pytest.raises(RuntimeError, match="cannot be opened"), checking(path):
        raise RuntimeError("cannot be opened")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for error in (None, RuntimeError("cannot be opened")):
        with pytest.raises(ArtefactError, match="is half overwritten") as found, checking(path):
            if error is not None:
                raise error
        assert found.value.__context__ is error
