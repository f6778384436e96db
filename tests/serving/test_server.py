"""The life cycle of a server: starting, answering, watching files, draining, ending."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_model import (
    BODY,
    expected_logits,
    faulty_images,
    metadata_of,
    plain_images,
    write_faulty_model,
)

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.data.images import read_image
from aoft_deploy.fleet.fleet import Fleet

psutil: Any = importlib.import_module("psutil")  # its type annotations are incomplete
IMAGES = np.random.default_rng(4).normal(size=(2, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def served(
    serve: Callable[..., Any],
    artefact: Path,
    pixel_artefact: Path,
    fleet_artefact: Path,
    fleet_tasks: dict[str, Path],
) -> Any:
    store = fleet_tasks["pets"].parent
    return serve(artefact, pixel_artefact, fleet_artefact, "--store", store, "--log-requests")


def form(files: list[bytes]) -> tuple[bytes, dict[str, str]]:
    head = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a.jpg"\r\n\r\n'
    content = b"".join(head + file + b"\r\n" for file in files) + b"--x--\r\n"
    return content, {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize("model", ["task", "pixels"])
def test_images_are_classified_like_in_the_library(
    served: Any, model: str, artefact: Path, pixel_artefact: Path, photos: list[Path]
) -> None:
    path = {"task": artefact, "pixels": pixel_artefact}[model]
    wanted = load_classifier(path).predict([read_image(photo) for photo in photos], top=5)
    files = [photo.read_bytes() for photo in photos]
    address = f"/v2/models/{model}/classify"
    status, _, content = served.ask("POST", address, *form(files))
    found = json.loads(content)
    assert (status, found["model_name"]) == (200, model)
    for answer, row in zip(found["predictions"], wanted, strict=True):
        assert [p["label"] for p in answer] == [p.label for p in row]
        assert np.allclose([p["probability"] for p in answer], [p[1] for p in row])
    for file, row in zip(files, wanted, strict=True):
        (answer,) = json.loads(served.ask("POST", address + "?top=2", file)[2])["predictions"]
        assert [p["label"] for p in answer] == [p.label for p in row[:2]]


def test_tasks_of_a_fleet_and_of_its_store_are_models(
    served: Any, fleet_artefact: Path, fleet_tasks: dict[str, Path], photos: list[Path]
) -> None:
    fleet = Fleet(fleet_artefact, store=fleet_tasks["pets"].parent, threads=1)
    for name in fleet_tasks:
        address = name.replace(" ", "%20").replace("ü", "%C3%BC")
        wanted = np.stack([a.logits for a in fleet.predict(IMAGES, [name] * 2)])
        assert np.abs(served.logits(address, IMAGES) - wanted).max() < 1e-5
        assert served.ask("GET", f"/v2/models/{address}/ready")[0] == 200
        assert (
            served.ask("POST", f"/v2/models/{address}/classify", photos[0].read_bytes())[0] == 200
        )
    index = json.loads(served.ask("POST", "/v2/repository/index", b'{"ready": true}')[2])
    assert {entry["name"] for entry in index} == {*fleet_tasks, "task", "pixels"}


def test_requests_of_different_tasks_share_batches(served: Any) -> None:
    def request(i: int) -> None:
        name = ("pets", "birds")[i % 2]
        assert served.ask("POST", f"/v2/models/{name}/infer", BODY)[0] == 200

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(request, range(200)))
    lines = served.ask("GET", "/metrics")[2].decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    batches = float(values['aoft_batch_size_count{artefact="fleet"}'])
    assert float(values['aoft_batch_size_sum{artefact="fleet"}']) > 1.5 * batches
    assert values["aoft_ready"] == "1" and float(values["aoft_in_flight"]) == 1
    assert values['aoft_queue_depth{artefact="fleet"}'] == "0"
    assert float(values['aoft_resident{artefact="fleet",device="cpu",key="tasks"}']) >= 2
    assert float(values['aoft_engine_seconds_total{artefact="fleet"}']) > 0
    for stage in ("queue", "engine", "request"):
        assert float(values[f'aoft_stage_seconds_count{{artefact="fleet",stage="{stage}"}}']) >= 200


def test_answer_and_log_contain_the_request_id(served: Any) -> None:
    for wanted, given in (("mine-1.a:b", True), ("not mine!", False), ("x" * 200, False)):
        headers = {"X-Request-Id": wanted}
        _, found, _ = served.ask("POST", "/v2/models/pets/infer", BODY, headers)
        name = found["x-request-id"]
        assert (name == wanted) is given

        def ready(name: str = name) -> bool:
            return any(event.get("request") == name for event in served.events)

        wait(ready, 60)
        (event,) = [e for e in served.events if e.get("request") == name]
        assert (event["event"], event["status"], event["model"]) == ("request", 200, "pets")
        assert event["milliseconds"] > 0 and event["method"] == "POST"


def test_the_server_needs_neither_torch_nor_timm_nor_other_engines(served: Any) -> None:
    maps = Path(f"/proc/{served.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert not any(f"/{name}/" in maps for name in ("torch", "openvino", "sklearn", "scipy"))


def test_the_default_address_is_local(served: Any) -> None:
    process = psutil.Process(served.process.pid)
    listening = [c for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
    assert [(c.laddr.ip, c.laddr.port) for c in listening] == [("127.0.0.1", served.port)]
    assert not process.children()


def test_a_connection_serves_sequential_and_pipelined_requests(served: Any) -> None:
    request = b"POST /v2/models/pets/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connection:
        connection.sendall((request % len(BODY) + BODY) * 5)
        found = b""
        while found.count(b'"outputs"') < 5:
            found += connection.recv(65536)
    assert found.count(b"HTTP/1.1 200") == 5


def test_an_openvino_folder_is_served(
    serve: Callable[..., Any], checkpoint: Path, backbone_weights: Path, tmp_path: Path
) -> None:
    code = "import sys\nfrom aoft_deploy.cli.export import main\nsys.exit(main(sys.argv[1:]))"
    folder = tmp_path / "task.openvino"
    options = ["--merge", checkpoint, "--to", "openvino", "--backbone-weights", backbone_weights]
    command = [sys.executable, "-c", code, *map(str, options), "-o", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    server = serve(folder)
    assert server.logits("task", IMAGES).shape == (2, 5)
    answer = json.loads(server.ask("GET", "/v2/models/task/config")[2])
    assert answer["backend"] == "openvino"
    assert server.stop() == 0


def test_requests_are_refused_until_the_engine_is_warm(
    serve: Callable[..., Any], artefact: Path
) -> None:
    server = serve(f"a={artefact}", f"b={artefact}", "--max-batch", 4096, ready=False)
    while "ready" not in {event["event"] for event in server.events}:
        status, headers, content = server.ask("POST", "/v2/models/a/infer", BODY)
        assert status in (200, 404, 503), content
        if status == 503:
            assert json.loads(content) == {"error": "The server is starting."}
            assert headers["retry-after"] == "1"
        assert server.ask("GET", "/v2/health/live")[0] == 200
    assert server.ask("GET", "/v2/health/ready")[0] == 200


def clients(server: Any, count: int, stop: threading.Event) -> list[threading.Thread]:
    """Clients with persistent connections; their answers go to ``server.found``.

    Like all such clients, they send a request again on a new connection if the old one ended
    without a byte of an answer, since the server may close idle connections.
    """
    server.found = []

    def client() -> None:
        import http.client

        connection, used = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60), False
        while not stop.is_set():
            try:
                connection.request("POST", "/v2/models/task/infer", BODY)
                response = connection.getresponse()
                server.found.append((response.status, response.read()))
                used = response.headers.get("Connection") != "close"
                if not used:
                    connection.close()
            except ConnectionRefusedError:
                return
            except (http.client.HTTPException, OSError) as error:
                again = used and type(error) in (http.client.RemoteDisconnected, BrokenPipeError)
                if not again:
                    server.found.append((0, repr(error).encode()))
                used = False
                connection.close()
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def load_logits(artefact: Path) -> Any:
    """The answers of an artefact in this process."""
    return load_artefact(artefact, EngineOptions(threads=1)).run(IMAGES)


def test_sigterm_under_load_loses_no_request_and_leaves_nothing_behind(
    serve: Callable[..., Any], artefact: Path
) -> None:
    server = serve(artefact)
    stop = threading.Event()
    threads = clients(server, 12, stop)
    wait(lambda: len(server.found) > 100, 60)
    assert server.session() == {server.process.pid}
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert server.stop() == 0
    assert not server.session() and not any(child.is_running() for child in children)
    stop.set()
    for thread in threads:
        thread.join()
    counts = {status: sum(s == status for s, _ in server.found) for status in (0, 200, 503)}
    assert counts[200] > 50 and sum(counts.values()) == len(server.found)
    assert counts[0] == 0, [content for status, content in server.found if not status]
    assert all(b"draining" in content for status, content in server.found if status == 503)
    assert server.event("drained")["lost"] == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
    again = serve(artefact, port=server.port)
    assert again.port == server.port
    assert np.array_equal(again.logits("task", IMAGES), load_logits(artefact))
    assert again.stop() == 0


@pytest.fixture(scope="module")
def slow(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact that is slow for every batch, also when it is opened."""
    path = tmp_path_factory.mktemp("slow") / "slow.onnx"
    return write_faulty_model(path, metadata_of(artefact), always=1000)


def working(server: Any) -> None:
    """Wait until an engine is computing."""
    process = psutil.Process(server.process.pid)
    before = process.cpu_times().user
    wait(lambda: process.cpu_times().user > before + 1)


def metric(server: Any, name: str) -> float:
    lines = server.ask("GET", "/metrics")[2].decode().splitlines()
    (value,) = (line.split()[-1] for line in lines if line.startswith(name + " "))
    return float(value)


def test_sigterm_lets_slow_requests_end_and_refuses_others(
    serve: Callable[..., Any], artefact: Path, tmp_path: Path
) -> None:
    server = serve(artefact, write_faulty_model(tmp_path / "made.onnx", metadata_of(artefact)))
    images = [plain_images(i) for i in range(12)]
    start = time.monotonic()
    server.logits("made", faulty_images(turns=0.1))
    second = 0.1 / (time.monotonic() - start)
    for image in images:
        image[0, 0, 0, 0] = second
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(server.logits, "made", image) for image in images]
        wait(lambda: metric(server, "aoft_in_flight") == 13)
        server.process.send_signal(signal.SIGTERM)
        server.event("draining")
        status, message = server.refused("GET", "/v2/health/ready")
        assert (status, message) == (503, "The server is draining.")
        assert server.refused("POST", "/v2/models/made/infer", BODY)[0] == 503
        assert server.ask("GET", "/v2/health/live")[0] == 200
        assert not any(answer.done() for answer in asked)
        for answer, image in zip(asked, images, strict=True):
            assert np.allclose(answer.result(), expected_logits(image), atol=1e-4)
    assert server.process.wait(5) == 0 and server.event("drained")["lost"] == 0


def test_idle_connections_and_incomplete_bodies_do_not_delay_shutdown(
    serve: Callable[..., Any], artefact: Path
) -> None:
    server = serve(artefact)
    head = b"POST /v2/models/task/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    fresh, idle, half = [
        [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(50)]
        for _ in range(3)
    ]
    for connection in idle:
        connection.sendall(head % len(BODY) + BODY)
        found = b""
        while not found.endswith(b"}"):
            found += connection.recv(65536)
        assert found.startswith(b"HTTP/1.1 200")
    for connection in half:
        connection.sendall(head % 99 + b"{")
    wait(lambda: metric(server, "aoft_in_flight") == 51, 60)
    assert server.stop() == 0  # although no client ends by itself, and the grace time is long
    assert server.event("drained")["lost"] == 0
    for connection in fresh + idle:
        assert connection.recv(1) == b""
    for connection in half:
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")
    for connection in fresh + idle + half:
        connection.close()


def test_new_requests_do_not_delay_shutdown(serve: Callable[..., Any], artefact: Path) -> None:
    server = serve(artefact)
    head = b"POST /v2/models/task/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{"
    stopped, knocked = threading.Event(), list[socket.socket]()

    def send_requests() -> (
        None
    ):  # each refused body is read for a second, during which more requests arrive
        with contextlib.suppress(OSError):
            while not stopped.wait(0.05):
                knocked.append(socket.create_connection(("127.0.0.1", server.port), timeout=5))
                knocked[-1].sendall(head)

    knocking = threading.Thread(target=send_requests)
    knocking.start()
    wait(lambda: len(knocked) > 10, 60)
    server.process.terminate()
    assert server.process.wait(25) == 0  # the grace time is 30 seconds
    assert server.event("drained")["lost"] == 0
    stopped.set()
    knocking.join()
    for connection in knocked:
        connection.close()


@pytest.mark.parametrize("given", [True, False])
def test_sigterm_does_not_wait_for_an_engine_that_is_being_opened(
    serve: Callable[..., Any], artefact: Path, slow: Path, tmp_path: Path, given: bool
) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    options = ["--repository", folder, "--follow", 0.1]
    server = serve(f"task={artefact}", *options) if not given else serve(slow, ready=False)
    if not given:
        shutil.copy(slow, folder / "slow.onnx")
    working(server)
    if not given:
        assert server.ask("POST", "/v2/models/task/infer", BODY)[0] == 200
    assert server.stop() == 0
    assert "ended" in {event["event"] for event in server.events} and not server.session()


def test_sigterm_waits_for_a_reload_for_the_grace_time_only(
    serve: Callable[..., Any], artefact: Path, slow: Path, tmp_path: Path
) -> None:
    folder, token = tmp_path / "repository", tmp_path / "token"
    folder.mkdir()
    token.write_text("0123456789abcdef")
    options = ["--repository", folder, "--follow", 0, "--admin-token-file", token, "--grace", 1]
    server = serve(f"task={artefact}", *options)
    shutil.copy(slow, folder / "slow.onnx")
    content = b"POST /v2/repository/models/slow/load HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(content + b"Authorization: Bearer 0123456789abcdef\r\n\r\n{}")
        working(server)
        assert server.stop() == 0  # loading takes longer
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 503") and b'{"error":"The server has ended."}' in answer
    assert server.event("drained")["lost"] == 1 and not server.session()
    assert "traceback" not in server.log_file.read_text().lower()


@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_after_sigkill_under_load_it_serves_again_on_the_same_port(
    serve: Callable[..., Any],
    artefact: Path,
    fleet_artefact: Path,
    fleet_tasks: dict[str, Path],
    contents: Callable[[Path], dict[str, str]],
    tmp_path: Path,
    http: str,
) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    shutil.copy(artefact, folder / "task.onnx")
    shutil.copy(fleet_tasks["zürich"], folder / "new.ckpt")
    before = contents(folder)
    options = [fleet_artefact, "--repository", folder, "--follow", 0.1, "--http", http]
    server = serve(*options)
    names = ("task", "new", "pets", "birds")
    expected = [server.logits(name, IMAGES) for name in names]
    stop = threading.Event()
    threads = clients(server, 12, stop)
    wait(lambda: len(server.found) > 100)
    server.kill()
    for thread in threads:
        thread.join()
    assert contents(folder) == before and not server.session()
    again = serve(*options, port=server.port)
    threads = clients(again, 12, stop)
    for name, logits in zip(names, expected, strict=True):
        assert np.array_equal(again.logits(name, IMAGES), logits)
    wait(lambda: len(again.found) > 100)
    stop.set()
    for thread in threads:
        thread.join()
    assert {status for status, _ in again.found} == {200}
    again.check()
    assert again.stop() == 0


def test_a_second_signal_ends_the_process_at_once(
    serve: Callable[..., Any], artefact: Path
) -> None:
    server = serve(artefact)
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    connection.sendall(
        b"POST /v2/models/task/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"
    )
    wait(lambda: metric(server, "aoft_in_flight") == 2)
    server.process.send_signal(signal.SIGINT)
    server.event("draining")
    assert server.stop() == 1
    assert "drained" not in {event["event"] for event in server.events}
    assert server.events[-1]["event"] == "ended by a second signal"
    connection.close()


def test_a_signal_during_the_start_ends_the_process(
    serve: Callable[..., Any], artefact: Path
) -> None:
    server = serve(artefact, ready=False)
    assert server.stop() == 0


def wait(until: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_changed_files_are_reloaded_without_losing_a_request(
    serve: Callable[..., Any],
    artefact: Path,
    fleet_artefact: Path,
    fleet_tasks: dict[str, Path],
    checkpoint: Path,
    backbone_weights: Path,
    tmp_path: Path,
) -> None:
    from aoft_deploy.cli.export import main

    folder = tmp_path / "repository"
    folder.mkdir()
    shutil.copy(artefact, folder / "task.onnx")
    server = serve(fleet_artefact, "--repository", folder, "--follow", 0.1)

    def names() -> set[str]:
        index = json.loads(server.ask("POST", "/v2/repository/index")[2])
        return {entry["name"] for entry in index if entry["state"] == "READY"}

    assert names() == {"task", "pets", "birds"}
    stop = threading.Event()
    threads = clients(server, 4, stop)
    before = server.logits("task", IMAGES)
    shutil.copy(fleet_tasks["zürich"], folder / "new.ckpt")
    wait(lambda: "new" in names())
    first = server.logits("new", IMAGES)
    (folder / "task.onnx").write_bytes(b"junk")
    wait(lambda: any(e["event"] == "model not loaded" for e in server.events))
    assert np.array_equal(server.logits("task", IMAGES), before)
    other = tmp_path / "other.onnx"
    options = ["--merge", fleet_tasks["pets"], "--backbone-weights", backbone_weights, "-o", other]
    assert main([str(option) for option in options]) == 0
    os.replace(other, folder / "task.onnx")
    wait(lambda: not np.allclose(server.logits("task", IMAGES), before))
    assert np.allclose(server.logits("task", IMAGES), server.logits("pets", IMAGES), atol=1e-4)
    shutil.copy(fleet_tasks["birds"], folder / "new.ckpt")
    wait(lambda: not np.allclose(server.logits("new", IMAGES), first))
    assert np.allclose(server.logits("new", IMAGES), server.logits("birds", IMAGES), atol=1e-5)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(server.found) > 100 and {status for status, _ in server.found} == {200}
    for name in ("new.ckpt", "task.onnx"):
        (folder / name).unlink()
    wait(lambda: names() == {"pets", "birds"})
    assert server.stop() == 0


def test_closed_engines_leave_no_thread(
    serve: Callable[..., Any], artefact: Path, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    server = serve(artefact, "--admin-token-file", token)
    headers = {"Authorization": "Bearer 0123456789abcdef"}

    def load() -> int:
        server.logits("task", IMAGES)
        address = "/v2/repository/models/task/load"
        assert server.ask("POST", address, b"", headers)[0] == 200
        return int(psutil.Process(server.process.pid).num_threads())

    counts = [load() for _ in range(20)]
    assert max(counts[10:]) <= max(counts[:10]) + 1


def test_too_many_connections_are_refused(serve: Callable[..., Any], artefact: Path) -> None:
    server = serve(artefact, "--max-connections", 10)
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(10)]
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 503") and b'{"error":"Too many connections."}' in answer
    assert server.ask("GET", "/v2/health/live")[0] == 200
    for connection in held:
        connection.close()
    wait(lambda: server.ask("GET", "/v2")[0] == 200)


def test_the_keep_alive_time_is_a_setting(serve: Callable[..., Any], artefact: Path) -> None:
    server = serve(artefact, "--keep-alive", 0.5)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        for _ in range(2):
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"live":true}'):
                piece = connection.recv(4096)
                assert piece, answer
                answer += piece
            assert answer.startswith(b"HTTP/1.1 200")
        assert connection.recv(4096) == b""  # well before the default of 75 seconds
    assert server.stop() == 0


def test_a_single_client_never_waits(serve: Callable[..., Any], artefact: Path) -> None:
    server = serve(artefact, "--max-wait", 10, "--timeout", 8)
    for _ in range(5):
        server.logits("task", IMAGES)  # times out before the batch is due


def test_health_has_the_form_of_the_protocol(served: Any) -> None:
    for address, wanted in {
        "/v2/health/live": {"live": True},
        "/v2/health/ready": {"ready": True},
        "/v2/models/task/ready": {"name": "task", "ready": True},
    }.items():
        status, headers, content = served.ask("GET", address)
        assert (status, headers["content-type"]) == (200, "application/json")
        assert json.loads(content) == wanted


@pytest.mark.parametrize("address", ["infer", "classify"])
def test_an_answer_uses_an_accepted_encoding(served: Any, address: str, photos: list[Path]) -> None:
    batch = IMAGES[:1].repeat(16, 0)
    entry = {"name": "pixel_values", "datatype": "FP32", "shape": batch.shape}
    body = json.dumps({"inputs": [{**entry, "data": batch.ravel().tolist()}]}).encode()
    if address == "classify":
        body = photos[0].read_bytes()

    def asked(accepted: str) -> tuple[int, str | None, bytes]:
        headers = {"Accept-Encoding": accepted}
        found = served.ask("POST", f"/v2/models/task/{address}", body, headers)
        return found[0], found[1].get("content-encoding"), found[2]

    _, none, plain = asked("gzip;q=0")
    assert none is None and json.loads(plain)
    status, encoding, packed = asked("gzip, identity;q=0")
    assert (status, encoding, gzip.decompress(packed)) == (200, "gzip", plain)
    status, encoding, packed = asked("deflate, identity;q=0")
    assert (status, encoding, zlib.decompress(packed)) == (200, "deflate", plain)
    status, encoding, content = asked("*;q=0")
    assert (status, encoding) == (406, None) and b"Accept-Encoding" in content


def test_a_form_in_several_gzip_members_is_answered(served: Any, photos: list[Path]) -> None:
    photo = photos[0].read_bytes()
    wanted = served.ask("POST", "/v2/models/task/classify", photo)[2]
    body, headers = form([photo])
    text = b'--x\r\nContent-Disposition: form-data; name="top"\r\n\r\n5\r\n'
    whole = b"preamble\r\n" + text + body + b"epilogue"
    packed = b"".join(gzip.compress(part) for part in (whole[:500], whole[500:]))
    for content, more in ((whole, {}), (packed, {"Content-Encoding": "gzip"})):
        answer = served.ask("POST", "/v2/models/task/classify", content, headers | more)
        assert (answer[0], answer[2]) == (200, wanted)
