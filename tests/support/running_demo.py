"""The command aoft-demo in a subprocess, and an HTTP client for it."""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Answer", "Demo", "DemoClient", "install", "uploaded_file"]


def install(root: Path, folder: Path) -> dict[str, str]:
    """Build the wheel of a checkout and install it with pip, with all files read-only.

    Args:
        root: The checkout.
        folder: Folder for the wheel and the installed packages.

    Returns:
        Environment variables with which Python imports the installed packages.
    """
    site = folder / "site"
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "install"]
    options = ["--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *options], check=True, capture_output=True)
    for path in site.rglob("*"):
        if path.is_file():
            path.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
    variables = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    print_path = [sys.executable, "-c", "import aoft_demo, aoft_deploy; print(aoft_demo.__file__)"]
    done = subprocess.run(
        print_path, env={**os.environ, **variables}, cwd=folder, check=True, capture_output=True
    )
    assert Path(os.fsdecode(done.stdout.strip())).is_relative_to(site)
    return variables


class Demo:
    """The command in a subprocess; it serves ``address`` when the constructor returns.

    Args:
        log: File for the command's output; temporary files are in the same folder.
        arguments: Arguments of the command.
        cwd: Working directory.
        environment: Additional environment variables.
    """

    def __init__(
        self,
        log: Path,
        *arguments: Path | str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [sys.executable, "-u", "-m", "aoft_demo.cli", *map(str, arguments)]
        command += ["--port", "0", "--threads", "1"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(log.parent)}
        variables.update(environment or {})
        self.log, self.folder, start = log, log.parent, time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=variables, cwd=cwd
            )
        self.address = self._wait_for_address(300)
        self.seconds = time.monotonic() - start

    def _wait_for_address(self, seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := re.search(r"is at (http://\S+)", self.log.read_text()):
                return found[1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def end(self, number: int = signal.SIGTERM) -> int:
        """Stop the command as a supervisor does and return its exit code.

        SIGTERM is the default, since processes started with ``nohup`` or ``&`` may ignore SIGINT.
        """
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


class Answer(NamedTuple):
    """Result of an event of the page.

    Attributes:
        success: Whether the handler ran.
        text: The handler's output as JSON, or the error.
    """

    success: bool
    text: str


class DemoClient:
    """An HTTP client of the demo; it sends paths unchanged.

    Args:
        demo: The running demo.
        cwd: The demo's working directory.
        home: The demo's home directory.
        network_log: File in which the demo logs its own network access, if it does.
    """

    def __init__(self, demo: Demo, cwd: Path, home: Path, network_log: Path) -> None:
        self.demo, self.cwd, self.home, self._network_log = demo, cwd, home, network_log
        host, _, port = demo.address.removeprefix("http://").partition(":")
        self.host, self.port = host, int(port)
        self.session = secrets.token_hex(6)
        config = json.loads(self.ask("GET", "/config")[2])
        self.ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
        handled = [event for event in config["dependencies"] if event["backend_fn"]]
        self.events = {tuple(t): event["id"] for event in handled for t in event["targets"]}

    @property
    def uploads(self) -> Path:
        """The demo's folder of uploaded files."""
        (folder,) = self.demo.folder.glob("aoft-demo-*/uploads")
        return folder

    @property
    def network_access(self) -> list[str]:
        """The demo's network access, without that to its own address."""
        own = f"('127.0.0.1', {self.port})", "'127.0.0.1'", "b'127.0.0.1'"
        log = self._network_log
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if not any(name in line for name in own)]

    def clear_network_log(self) -> None:
        """Delete the log of the demo's network access."""
        self._network_log.unlink(missing_ok=True)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request; return the status, the headers by lower-case names, and the content."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            named = any(name.lower() == "host" for name in headers or {})
            connection.putrequest(method, path, skip_host=named)
            length = {"Content-Length": str(len(body))} if body is not None else {}
            for name, value in {**length, **(headers or {})}.items():
                connection.putheader(name, value)
            connection.endheaders()
            try:
                for start in range(0, len(body or b""), 65536):
                    connection.send((body or b"")[start : start + 65536])
            except OSError:  # the server has closed the connection early
                pass
            response = connection.getresponse()
            received = {name.lower(): value for name, value in response.getheaders()}
            return response.status, received, response.read()
        finally:
            connection.close()

    def upload(self, name: str | bytes, content: bytes) -> tuple[int, str]:
        """Upload a file; return the status, and the file's path or the error."""
        raw = name if isinstance(name, bytes) else name.encode()
        body = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="' + raw + b'"\r\n'
            b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n--x--\r\n"
        )
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        status, _, answer = self.ask("POST", "/gradio_api/upload", body, headers)
        return status, json.loads(answer)[0] if status == 200 else answer.decode()

    def call(self, part: str, event: str, *data: Any, event_data: Any = None) -> Answer:
        """Fire an event of the page and wait for its result.

        Args:
            part: ``elem_id`` of the component.
            event: Name of the event, such as ``click``.
            data: Values of the event's inputs.
            event_data: The event's own data.
        """
        for message in self.fire(part, event, *data, event_data=event_data):
            if message["msg"] == "process_completed":
                return Answer(message["success"], json.dumps(message["output"]))
            if message["msg"] == "refused":
                return Answer(False, message["output"])
        raise AssertionError("the event has not ended")

    def fire(
        self, part: str, event: str, *data: Any, event_data: Any = None
    ) -> Iterator[dict[str, Any]]:
        """Fire an event of the page; yield the server's messages. Arguments as for ``call``."""
        number = self.ids[part]
        join = {
            "data": data,
            "event_data": event_data,
            "fn_index": self.events[number, event],
            "session_hash": self.session,
            "trigger_id": number,
        }
        headers = {"Content-Type": "application/json"}
        body = json.dumps(join).encode()
        status, _, answer = self.ask("POST", "/gradio_api/queue/join", body, headers)
        if status == 200:
            yield from self._messages()
        else:
            yield {"msg": "refused", "output": answer.decode()}

    def _messages(self) -> Iterator[dict[str, Any]]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        try:
            connection.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
            for line in connection.getresponse():
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))
        finally:
            connection.close()

    def classify(self, path: str, tasks: Any = ("digits",)) -> Answer:
        """Classify a file as if the page had uploaded it."""
        return self.call("picture", "change", uploaded_file(path), list(tasks))

    def memory(self) -> int:
        """Resident memory of the demo in bytes."""
        pages = Path(f"/proc/{self.demo.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def uploaded_file(path: str, **more: Any) -> dict[str, Any]:
    """An uploaded file, as the page sends it in an event."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
