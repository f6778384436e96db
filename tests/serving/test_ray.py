"""The application under Ray Serve: two replicas, one killed under load."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_model import BODY

from aoft_deploy.errors import SettingError
from aoft_deploy.serving.ray import app

DRIVER = """
import sys
import ray
from ray import serve
from aoft_deploy.serving.ray import app

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(app({"config": sys.argv[1], "replicas": "2", "cpus": "0.5"}))
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "Arguments are none: give config=FILE"),
        ({"config": "a", "port": "1"}, "Arguments are config, port"),
        ({"config": "a", "replicas": "x"}, "replicas and cpus must be numbers"),
        ({"config": "/none.toml"}, "cannot be read as TOML"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, str], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        app(arguments)


def test_a_replica_gets_the_gpus_that_its_settings_name(tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text('artefacts = ["task.onnx"]\ndevice = ["cuda:0", "cuda:1"]\n')
    shown = "app({'config': sys.argv[1], 'cpus': '3'})._bound_deployment.ray_actor_options"
    code = f"import json, sys; from aoft_deploy.serving.ray import app; print(json.dumps({shown}))"
    done = subprocess.run([sys.executable, "-c", code, str(config)], capture_output=True, text=True)
    assert json.loads(done.stdout) == {"num_cpus": 3, "num_gpus": 2}, done.stderr


@pytest.fixture
def port(fleet_artefact: Path, artefact: Path, tmp_path: Path) -> Iterator[int]:
    config = tmp_path / "serve.toml"
    config.write_text(f'artefacts = ["{artefact}", "{fleet_artefact}"]\nthreads = 1\nfollow = 0\n')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(config), str(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
    )
    assert driver.stdin and driver.stdout
    try:
        while b"ready" not in (line := driver.stdout.readline()):
            assert line, "Ray did not start"
        yield number
    finally:
        driver.stdin.close()
        driver.wait(90)
        driver.stdout.close()


def replicas() -> list[int]:
    """Processes of this user that are replicas of the deployment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if b"ServeReplica:default:Served" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


@pytest.mark.stress
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Ray is not made for this Python yet")
def test_killing_a_replica_fails_only_its_own_requests(port: int) -> None:
    def ask(connection: http.client.HTTPConnection, model: str) -> tuple[int, Any]:
        connection.request("POST", f"/v2/models/{model}/infer", BODY)
        response = connection.getresponse()
        content = response.read()  # for a failed request, the proxy's text
        return response.status, json.loads(content) if response.status == 200 else content

    def logits(answer: Any) -> Any:
        return np.array(answer["outputs"][0]["data"])

    first = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    models = ("pets", "birds", "task")
    expected = {model: logits(ask(first, model)[1]) for model in models}
    first.close()
    found: Counter[str] = Counter()
    end = time.monotonic() + 8

    def client(number: int) -> None:
        model = models[number % 3]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while time.monotonic() < end:
            try:
                status, answer = ask(connection, model)
            except (http.client.HTTPException, OSError):
                found["failed"] += 1
                connection.close()
                continue
            if status != 200:
                found["failed"] += 1
            elif not np.allclose(logits(answer), expected[model], atol=1e-5):
                found["wrong"] += 1
            else:
                found["right"] += 1
        connection.close()

    before = replicas()
    assert len(before) == 2
    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    os.kill(before[0], signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert found["wrong"] == 0 and found["right"] > 100
    assert found["failed"] <= 8  # the requests in flight, of eight clients
    start = time.monotonic()
    while len(replicas()) < 2:
        assert time.monotonic() - start < 30
        time.sleep(0.2)
