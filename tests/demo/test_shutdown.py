"""The end of the demo: it comes soon and leaves no process and no file."""

from __future__ import annotations

import http.client
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_demo import Demo, DemoClient
from teaching import taught_classes

from aoft_demo.shutdown import SIGNALS, interrupt_on_signals, temporary_folder
from aoft_demo.tasks.shared_fleet import bundled_checkpoints
from aoft_demo.tasks.skills import bundled_examples

psutil: Any = importlib.import_module("psutil")  # its types are partial

pytestmark = pytest.mark.slow


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    (tmp_path / "tmp").mkdir()
    running = Demo(tmp_path / "tmp" / "log", cwd=tmp_path)
    yield running
    running.end()


def connection_with(client: DemoClient, request: bytes) -> socket.socket:
    """An open connection on which a request was sent."""
    connection = socket.create_connection((client.host, client.port))
    connection.sendall(request)
    return connection


def start_training(client: DemoClient) -> list[Any]:
    """Start a training, and return its processes; a thread receives its progress."""
    classes = taught_classes(client, 12)
    curve_shown = threading.Event()

    def receive() -> None:
        try:
            for message in client.fire("train", "click", "endless", classes):
                if "polyline" in json.dumps(message):
                    curve_shown.set()
        except (OSError, http.client.HTTPException):
            pass  # the demo has ended

    threading.Thread(target=receive, daemon=True).start()
    assert curve_shown.wait(300), client.demo.log.read_text()
    children: list[Any] = psutil.Process(client.demo.process.pid).children(recursive=True)
    return [child for child in children if "aoft_demo.trainer" in child.cmdline()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_a_training_and_an_upload_leaves_nothing(
    demo: Demo, number: signal.Signals
) -> None:
    client = DemoClient(demo, demo.folder, demo.folder, demo.folder / "none")
    assert client.upload("a.png", bundled_examples()[0].file.read_bytes())[0] == 200
    path = f"/gradio_api/heartbeat/{client.session}"
    heartbeat = connection_with(client, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    assert heartbeat.recv(15) == b"HTTP/1.1 200 OK"
    training = start_training(client)
    assert len(training) == 1
    half_upload = connection_with(
        client,
        b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9000000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        b'Content-Disposition: form-data; name="files"; filename="b.png"\r\n\r\n' + bytes(2**20),
    )
    demo.process.send_signal(number)
    demo.process.send_signal(number)  # an impatient user
    assert demo.end() == 0  # without waiting for the training
    assert not any(process.is_running() for process in training)
    assert {path.name for path in demo.folder.iterdir()} == {"log"}
    assert "Traceback" not in demo.log.read_text()
    half_upload.close()
    heartbeat.close()


def test_a_running_export_does_not_delay_the_end(demo: Demo) -> None:
    client = DemoClient(demo, demo.folder, demo.folder, demo.folder / "none")
    started = threading.Event()

    def export() -> None:
        try:
            for _ in client.fire("export", "click", bundled_checkpoints()[0].stem, "onnx"):
                started.set()
        except (OSError, http.client.HTTPException):
            pass

    threading.Thread(target=export, daemon=True).start()
    assert started.wait(120)
    assert demo.end() == 0
    assert {path.name for path in demo.folder.iterdir()} == {"log"}


def test_an_interrupted_start_leaves_nothing(tmp_path: Path) -> None:
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


def test_a_signal_while_the_temporary_folder_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    make, made = tempfile.mkdtemp, list[str]()

    def signalled(**options: str) -> str:
        made.append(make(**options))
        os.kill(os.getpid(), signal.SIGTERM)
        return made[0]

    monkeypatch.setattr(tempfile, "mkdtemp", signalled)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        interrupt_on_signals()
        with pytest.raises(KeyboardInterrupt), temporary_folder():
            raise AssertionError("the signal was lost")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert made and not any(tmp_path.iterdir())
