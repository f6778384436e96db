"""The command aoft-serve in a subprocess, and an HTTP client for it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Served"]

ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**18),
    "MALLOC_TRIM_THRESHOLD_": str(2**18),
}
"""Settings of glibc with which freed memory goes back to the system at once."""

HOST_DETAILS = ("/tmp", "traceback", ".py", "onnxruntime", "0x")
"""Lower-case texts that no error message for a client may contain."""


class Served:
    """A server in a subprocess, in its own process session; it listens on the loopback address.

    Args:
        folder: Folder for the server's log.
        arguments: Arguments of the command.
        port: Port to listen on; 0 takes a free one.
        shell: Shell command to run before the server, such as ``ulimit``.
    """

    def __init__(self, folder: Path, *arguments: object, port: int = 0, shell: str = "") -> None:
        self.log_file = folder / "serve.log"
        command = [sys.executable, "-m", "aoft_deploy.cli.serve", *map(str, arguments)]
        if shell:
            command = ["bash", "-c", f'{shell} && exec "$0" "$@"', *command]
        environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1"}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(port), "--threads", "1"],
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self._checked = 0
        self.port = int(self.event("listening")["port"])

    @property
    def events(self) -> list[dict[str, Any]]:
        """Events in the server's log; a line that is still being written is left out."""
        lines = self.log_file.read_bytes().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line[:1] == b"{" and line.endswith(b"\n")]

    def event(self, name: str, seconds: float = 30) -> dict[str, Any]:
        """Wait for an event in the log and return the latest one."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            matching = [event for event in self.events if event["event"] == name]
            if matching:
                return matching[-1]
            assert self.process.poll() is None, self.log_file.read_text()
            time.sleep(0.01)
        raise AssertionError(f"no {name}: {self.log_file.read_text()}")

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request on a new connection; return status, lower-case headers and content."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            received = {name.lower(): value for name, value in response.getheaders()}
            return response.status, received, response.read()
        finally:
            connection.close()

    def refused(self, *request: Any, **more: Any) -> tuple[int, str]:
        """Send a request that must fail; return the status and the message."""
        return self.sentence(*self.ask(*request, **more))

    @staticmethod
    def sentence(status: int, headers: Mapping[str, str], content: bytes) -> tuple[int, str]:
        """Check that an answer is an error of the protocol; return the status and the message."""
        assert status >= 400, content
        assert headers["content-type"] == "application/json"
        answer = json.loads(content)
        assert list(answer) == ["error"]
        message = answer["error"]
        assert isinstance(message, str) and message
        assert not any(word in message.lower() for word in HOST_DETAILS), message
        return status, message

    def logits(self, model: str, images: np.ndarray[Any, Any], **more: Any) -> Any:
        """Logits of a batch, sent in the protocol's binary form."""
        name, kind = ("image", "UINT8") if images.dtype == np.uint8 else ("pixel_values", "FP32")
        size = {"binary_data_size": images.nbytes}
        entry = {"name": name, "datatype": kind, "shape": images.shape, "parameters": size}
        text = json.dumps({"inputs": [entry], **more}).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        address = f"/v2/models/{model}/infer"
        status, _, content = self.ask("POST", address, text + images.tobytes(), headers)
        assert status == 200, content
        (output,) = json.loads(content)["outputs"]
        return np.array(output["data"], np.float32).reshape(output["shape"])

    def check(self) -> None:
        """Assert that the server is ready, logs only JSON, and has logged no internal error.

        A traceback is allowed only in the event ``engine failed``.
        """
        assert self.process.poll() is None
        assert self.ask("GET", "/v2/health/ready")[0] == 200
        complete, _, _ = self.log_file.read_bytes()[self._checked :].rpartition(b"\n")
        self._checked += len(complete)
        for line in complete.splitlines():
            assert b"Traceback" not in line
            event = json.loads(line) if line else {"event": ""}
            assert event["event"] not in ("request failed", "library", "following files failed")
            assert "traceback" not in event or event["event"] == "engine failed"

    def memory(self) -> int:
        """The server's resident memory in bytes."""
        text = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @contextmanager
    def within(self, extra: int) -> Iterator[None]:
        """Context manager: assert that the memory never grows by this many bytes."""
        folder = Path(f"/proc/{self.process.pid}")
        (folder / "clear_refs").write_text("5")  # resets the peak
        before = self.memory()
        yield
        lines = (folder / "status").read_text().splitlines()
        (peak,) = (1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        assert peak - before < extra

    def session(self) -> set[int]:
        """Ids of all processes that the server has started and that still run, and its own."""
        processes = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(ProcessLookupError, PermissionError):
                if os.getsid(int(folder.name)) == self.process.pid:
                    processes.add(int(folder.name))
        return processes

    def stop(self, number: int = signal.SIGTERM, seconds: float = 15) -> int:
        """Send a signal, wait for the end and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """Kill the server."""
        self.process.kill()
        self.process.wait()
