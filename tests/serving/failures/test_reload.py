"""Changes of the repository: who may make them, and what bad files do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from failure_requests import (
    ADMIN,
    IMAGES,
    INFER,
    TOKEN,
    body,
    entry,
)
from faulty_model import without_digest
from safetensors.numpy import load_file, save_file


def changed(server: Any, name: str, change: str = "load", content: Any = b"{}") -> tuple[int, str]:
    """Change the repository with the token; return status and message."""
    address = f"/v2/repository/models/{name}/{change}"
    answer = server.ask("POST", address, content, ADMIN)
    return (200, "") if answer[0] == 200 else server.sentence(*answer)


@pytest.mark.parametrize("change", ["load", "unload"])
def test_changing_the_repository_needs_the_token(served: Any, change: str) -> None:
    address = f"/v2/repository/models/task/{change}"
    for token in (None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", TOKEN, "Bearer \xff"):
        headers = {} if token is None else {"Authorization": token}
        assert served.refused("POST", address, b"{}", headers)[0] == 403


@pytest.mark.parametrize("change", ["load", "unload"])
def test_a_server_without_a_token_refuses_all_changes(wire: Any, change: str) -> None:
    address = f"/v2/repository/models/task/{change}"
    for token in (None, "", "Bearer", "Bearer ", "Bearer None", f"Bearer {TOKEN}"):
        headers = {} if token is None else {"Authorization": token}
        status, message = wire.refused("POST", address, b"{}", headers)
        assert (status, message) == (403, "The repository cannot be changed over HTTP.")


@pytest.fixture(scope="module")
def canary() -> Iterator[socket.socket]:
    """A listening socket to which nothing may connect."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


@pytest.mark.parametrize(
    "parameters",
    [
        {"config": "{}"},
        {"file:../../x": "aGk="},
        {"file:1/model.onnx": "aGk="},
        {"source": "http://CANARY/x.onnx"},
        {"url": "http://CANARY/x.onnx"},
        [],
        "http://CANARY/x.onnx",
        1,
    ],
)
def test_no_file_or_url_from_a_client_is_loaded(
    served: Any, repository: Path, canary: socket.socket, parameters: Any
) -> None:
    before = sorted(repository.parent.rglob("*"))
    host = f"127.0.0.1:{canary.getsockname()[1]}"
    content = json.dumps({"parameters": parameters}).replace("CANARY", host)
    if parameters == []:  # the same as no parameters
        assert changed(served, "task", content=content)[0] == 200
    else:
        assert changed(served, "task", content=content)[0] == 400
    link = f"http:%2F%2F{host}%2Fx.onnx"
    for name in ("outside", "..%2Foutside", "x" * 256, link, f"file:%2F%2F{host}%2Fx.onnx"):
        assert changed(served, name)[0] in (400, 404)
    picture = f'<svg><image href="http://{host}/a.png"/></svg>'.encode()
    assert served.refused("POST", "/v2/models/task/classify", picture)[0] == 415
    assert served.refused("POST", INFER, body(entry(data=f"http://{host}/a")))[0] == 400
    assert sorted(repository.parent.rglob("*")) == before
    with pytest.raises(BlockingIOError):
        canary.accept()


def test_models_are_loaded_and_unloaded_during_requests(served: Any) -> None:
    end, found = time.monotonic() + 1.5, list[tuple[str, int]]()

    def change(name: str, kind: str) -> None:
        while time.monotonic() < end:
            address = f"/v2/repository/models/{name}/{kind}"
            found.append((kind, served.ask("POST", address, b"{}", ADMIN)[0]))

    def request(name: str) -> None:
        content = body()
        while time.monotonic() < end:
            found.append(("infer", served.ask("POST", f"/v2/models/{name}/infer", content)[0]))

    work: list[tuple[Any, ...]] = [
        (target, name, *kind)
        for name in ("zürich", "changing")
        for target, *kind in ((change, "load"), (change, "unload"), (request,))
    ]
    quoted = {"zürich": "z%C3%BCrich", "changing": "changing"}
    with ThreadPoolExecutor(len(work)) as pool:
        for task in [pool.submit(f, quoted[name], *rest) for f, name, *rest in work]:
            task.result()
    assert {status for _, status in found} == {200, 404}
    assert {kind for kind, status in found if status == 200} == {"load", "unload", "infer"}
    for name in quoted.values():
        assert served.ask("POST", f"/v2/repository/models/{name}/load", b"{}", ADMIN)[0] == 200


GRAPHS = ("cyclic", "opset", "unknown operator", "truncated", "random", "outside", "no model")


def damaged(artefact: Path, path: Path, fault: str) -> None:
    """Write a copy of an artefact with a fault."""
    proto = onnx.load(artefact)
    if fault == "cyclic":
        proto.graph.node[0].input[0] = proto.graph.node[-2].output[0]
    elif fault == "outside":
        onnx.external_data_helper.set_external_data(proto.graph.initializer[0], "../secret")
        proto.graph.initializer[0].ClearField("raw_data")
    elif fault == "opset":
        proto.opset_import[0].version = 999
    elif fault == "unknown operator":
        proto.graph.node[0].op_type = "Nonsense"
    elif fault == "no model":
        del proto.metadata_props[:]
    content = without_digest(proto)
    if fault == "truncated":
        content = content[: len(content) // 2]
    elif fault == "random":
        content = os.urandom(5000)
    path.write_bytes(content)


def reason(served: Any, name: str) -> str:
    """The index's reason why a model that is ready could not be reloaded."""
    index = json.loads(served.ask("POST", "/v2/repository/index")[2])
    (found,) = (entry for entry in index if entry["name"] == name)
    assert found["state"] == "READY"
    return str(found["reason"])


@pytest.mark.parametrize("fault", GRAPHS)
def test_a_bad_artefact_does_not_replace_a_good_one(
    served: Any, repository: Path, artefact: Path, fault: str
) -> None:
    path = repository / "changing.onnx"
    damaged(artefact, path, fault)
    try:
        before = served.logits("changing", IMAGES)
        status, message = changed(served, "changing")
        assert status == 400 and message.startswith("changing was not loaded: changing.onnx ")
        fault_shown = reason(served, "changing")
        assert message.endswith(fault_shown) and str(repository) not in fault_shown
        assert np.array_equal(served.logits("changing", IMAGES), before)
    finally:
        shutil.copy(artefact, path)
    assert changed(served, "changing")[0] == 200 and reason(served, "changing") == ""


@pytest.mark.parametrize("fault", GRAPHS)
def test_a_server_with_a_bad_artefact_reports_it_and_exits(
    artefact: Path, tmp_path: Path, fault: str
) -> None:
    damaged(artefact, tmp_path / "bad.onnx", fault)
    command = [sys.executable, "-m", "aoft_deploy.cli.serve", "bad.onnx", "--port", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    *logged, sentence = done.stderr.splitlines()
    assert done.returncode == 1 and sentence.startswith("error: bad.onnx ")
    events = [json.loads(line)["event"] for line in logged]
    assert "ready" not in events and not any("Traceback" in line for line in logged)


def faulty_checkpoint(good: Path, path: Path, fault: str, other: Path) -> None:
    """Write a copy of a checkpoint with a fault."""
    tensors = load_file(good)
    with good.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        text = json.loads(file.read(length))["__metadata__"]["aoft"]
    name = next(iter(tensors))
    if fault == "deep":
        text = "[" * 100_000
    elif fault == "no JSON":
        text = "{"
    elif fault == "no object":
        text = "[]"
    elif fault == "NaN":
        tensors[name] = np.full_like(tensors[name], np.nan)
    elif fault == "infinite":
        tensors[name] = np.full_like(tensors[name], np.inf)
    elif fault == "shape":
        tensors[name] = np.zeros((1, *tensors[name].shape), np.float32)
    elif fault == "no head":
        tensors = {name: t for name, t in tensors.items() if not name.startswith("head.")}
    elif fault == "another backbone":
        described = json.loads(text)
        described["backbone"]["digest"] = "0" * 64
        text = json.dumps(described)
    save_file(tensors, path, {"aoft": text})
    if fault == "pickle":
        path.write_bytes(b"\x80\x04junk")
    elif fault == "truncated":
        path.write_bytes(good.read_bytes()[:-9])
    elif fault == "another method":
        shutil.copy(other, path)


CHECKPOINTS = ["pickle", "truncated", "deep", "no JSON", "no object", "NaN", "infinite", "shape"]

CHECKPOINTS += ["no head", "another backbone", "another method"]


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_a_bad_checkpoint_does_not_replace_a_task(
    served: Any, repository: Path, fleet_tasks: dict[str, Path], checkpoint: Path, fault: str
) -> None:
    path, name = repository / "zürich.ckpt", "z%C3%BCrich"
    before = served.logits(name, IMAGES)
    faulty_checkpoint(fleet_tasks["zürich"], path, fault, checkpoint)
    try:
        status, message = changed(served, name)
        assert status == 400 and message.startswith("zürich was not loaded: ")
        fault_shown = reason(served, "zürich")
        assert (
            message.endswith(fault_shown)
            and "zürich.ckpt" in fault_shown
            and str(repository) not in fault_shown
        )
        assert np.array_equal(served.logits(name, IMAGES), before)
    finally:
        shutil.copy(fleet_tasks["zürich"], path)
    assert changed(served, name)[0] == 200 and reason(served, "zürich") == ""


def test_any_exception_of_a_reader_is_reported(
    served: Any, repository: Path, fleet_artefact: Path
) -> None:
    proto = onnx.load(fleet_artefact)
    for metadata in proto.metadata_props:
        if metadata.key == "preprocessing":
            metadata.value = "3"
    path = repository / "strange.onnx"
    path.write_bytes(without_digest(proto))
    status, message = changed(served, "strange")
    path.unlink()
    assert status == 400 and message.startswith("strange was not loaded: strange.onnx ")
    assert served.refused("GET", "/v2/models/strange")[0] == 404


def test_a_pipe_in_the_repository_is_skipped(served: Any, repository: Path) -> None:
    for name in ("pipe.ckpt", "pipe.onnx"):
        os.mkfifo(repository / name)
    (repository / "nowhere.onnx").symlink_to("none")
    try:
        assert changed(served, "pipe")[0] == changed(served, "nowhere")[0] == 404
    finally:
        for name in ("pipe.ckpt", "pipe.onnx", "nowhere.onnx"):
            (repository / name).unlink()


def test_a_good_checkpoint_replaces_a_task(
    served: Any, repository: Path, fleet_tasks: dict[str, Path]
) -> None:
    path, name = repository / "zürich.ckpt", "z%C3%BCrich"
    shutil.copy(fleet_tasks["pets"], path)
    try:
        assert changed(served, name)[0] == 200
        wanted = served.logits("pets", IMAGES)
        assert np.allclose(served.logits(name, IMAGES), wanted, atol=1e-5)
    finally:
        shutil.copy(fleet_tasks["zürich"], path)
    assert changed(served, name)[0] == 200
