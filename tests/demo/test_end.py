"""How the demo ends: soon, with nothing of its visitors left, whatever they are doing."""

from __future__ import annotations

import http.client
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_demo import Demo, Stranger

from aoft_demo.tasks.shared_fleet import BUNDLED

psutil: Any = importlib.import_module("psutil")  # its types are partial

pytestmark = pytest.mark.slow


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    (tmp_path / "tmp").mkdir()
    running = Demo(tmp_path / "tmp" / "log", cwd=tmp_path)
    yield running
    running.end()


def opened(stranger: Stranger, request: bytes) -> socket.socket:
    """A connection with a request that does not end."""
    connection = socket.create_connection((stranger.host, stranger.port))
    connection.sendall(request)
    return connection


def begun(stranger: Stranger) -> list[Any]:
    """Processes of a training that has just begun; a thread goes on to follow it."""
    classes: list[Any] = ["", None] * 4
    start = ("Drawn for you", "shape", 800, "endless", "normal", *classes)
    drawn = threading.Event()

    def follow() -> None:
        try:
            for message in stranger.fire("train", "click", *start):
                if "polyline" in json.dumps(message):
                    drawn.set()
        except (OSError, http.client.HTTPException):
            pass  # the demo has ended

    threading.Thread(target=follow, daemon=True).start()
    assert drawn.wait(300), stranger.demo.log.read_text()
    children: list[Any] = psutil.Process(stranger.demo.process.pid).children(recursive=True)
    return [child for child in children if "aoft_deploy.cli.train" in child.cmdline()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_of_visitors_who_are_in_the_middle_of_something(
    demo: Demo, number: signal.Signals
) -> None:
    stranger = Stranger(demo, demo.folder, demo.folder, demo.folder / "none")
    assert stranger.upload("a.png", (BUNDLED / "digits-7.png").read_bytes())[0] == 200
    path = f"/gradio_api/heartbeat/{stranger.session}"
    heartbeat = opened(stranger, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    assert heartbeat.recv(15) == b"HTTP/1.1 200 OK"
    training = begun(stranger)
    assert len(training) == 1
    half = opened(
        stranger,
        b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9000000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        b'Content-Disposition: form-data; name="files"; filename="b.png"\r\n\r\n' + bytes(2**20),
    )
    demo.process.send_signal(number)
    demo.process.send_signal(number)  # by someone impatient
    assert demo.end() == 0  # a training that has epochs to go does not hold it
    assert not any(process.is_running() for process in training)
    assert {path.name for path in demo.folder.iterdir()} == {"log"}
    assert "Traceback" not in demo.log.read_text()
    half.close()
    heartbeat.close()


def test_an_export_that_computes_does_not_hold_the_end(demo: Demo) -> None:
    stranger = Stranger(demo, demo.folder, demo.folder, demo.folder / "none")
    asked = threading.Event()

    def export() -> None:
        try:
            for _ in stranger.fire("export", "click", "digits", False):
                asked.set()
        except (OSError, http.client.HTTPException):
            pass

    threading.Thread(target=export, daemon=True).start()
    assert asked.wait(120)
    assert demo.end() == 0
    assert {path.name for path in demo.folder.iterdir()} == {"log"}


def test_a_start_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    command = [sys.executable, "-u", "-m", "aoft_demo.cli", "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(folder), "AOFT_CACHE_DIR": ""}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Opening the tasks")
    while not any(folder.iterdir()):
        assert process.poll() is None
    process.terminate()
    rest = process.stdout.read()
    assert process.wait() == 0 and "is at" not in rest
    assert not any(folder.iterdir())
    process.stdout.close()
