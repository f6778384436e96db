"""The demo's command in a process of its own, and what to throw at it."""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import signal
import stat
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Answer", "Demo", "Stranger", "bomb", "install", "told"]

ROOT = Path(__file__).parents[2]


def install(folder: Path) -> dict[str, str]:
    """Install this checkout's wheel in a folder, as pip does for a user; nobody may write there.

    Returns:
        Variables with which Python finds it before the checkout.
    """
    site = folder / "site"
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "install"]
    options = ["--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *options], check=True, capture_output=True)
    for path in site.rglob("*"):
        if path.is_file():
            path.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
    variables = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    where = [sys.executable, "-c", "import aoft_demo, aoft_deploy; print(aoft_demo.__file__)"]
    found = subprocess.run(
        where, env={**os.environ, **variables}, cwd=folder, check=True, capture_output=True
    )
    assert Path(os.fsdecode(found.stdout.strip())).is_relative_to(site)
    return variables


class Demo:
    """The command in a process, at ``address`` once it says so.

    Args:
        log: Where its output goes; temporary files lie beside.
        arguments: Of the command.
        cwd: Its working directory.
        environment: Variables beside those of this process.
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
        own = {"OMP_NUM_THREADS": "1", "TMPDIR": str(log.parent), **(environment or {})}
        self.log, self.folder, start = log, log.parent, time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **own}, cwd=cwd
            )
        self.address = self._address(300)
        self.seconds = time.monotonic() - start

    def _address(self, seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := re.search(r"is at (http://\S+)", self.log.read_text()):
                return found[1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def end(self, number: int = signal.SIGTERM) -> int:
        """As a supervisor does; Ctrl-C means the same, but is ignored below ``nohup`` and ``&``."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


class Answer(NamedTuple):
    """What came of an event of the page.

    Attributes:
        success: Whether its handler ran.
        text: What it gave, or what is told of the fault.
    """

    success: bool
    text: str


class Stranger:
    """Someone with an HTTP client; paths go out as they are given."""

    def __init__(self, demo: Demo, folder: Path, home: Path, asked: Path) -> None:
        self.demo, self.cwd, self.home, self._asked = demo, folder, home, asked
        host, _, port = demo.address.removeprefix("http://").partition(":")
        self.host, self.port = host, int(port)
        self.session = secrets.token_hex(6)
        config = json.loads(self.ask("GET", "/config")[2])
        self.ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
        handled = [found for found in config["dependencies"] if found["backend_fn"]]
        self.events = {tuple(t): found["id"] for found in handled for t in found["targets"]}

    @property
    def uploads(self) -> Path:
        (folder,) = self.demo.folder.glob("aoft-demo-*/uploads")
        return folder

    @property
    def asked(self) -> list[str]:
        """Whom the server asked on any network, without itself as it starts."""
        own = f"('127.0.0.1', {self.port})", "'127.0.0.1'", "b'127.0.0.1'"
        lines = self._asked.read_text().splitlines() if self._asked.exists() else []
        return [line for line in lines if not any(name in line for name in own)]

    def forget(self) -> None:
        """Whom it asked."""
        self._asked.unlink(missing_ok=True)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case, and content."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            named = any(name.lower() == "host" for name in headers or {})
            connection.putrequest(method, path, skip_host=named)
            given = {"Content-Length": str(len(body))} if body is not None else {}
            for name, value in {**given, **(headers or {})}.items():
                connection.putheader(name, value)
            connection.endheaders()
            try:
                for start in range(0, len(body or b""), 65536):
                    connection.send((body or b"")[start : start + 65536])
            except OSError:  # it has heard enough
                pass
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return response.status, found, response.read()
        finally:
            connection.close()

    def upload(self, name: str | bytes, content: bytes) -> tuple[int, str]:
        """Status and what was told: the place of the file, or the fault."""
        raw = name if isinstance(name, bytes) else name.encode()
        body = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="' + raw + b'"\r\n'
            b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n--x--\r\n"
        )
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        status, _, told = self.ask("POST", "/gradio_api/upload", body, headers)
        return status, json.loads(told)[0] if status == 200 else told.decode()

    def call(self, part: str, event: str, *data: Any) -> Answer:
        """Fire an event of the page and wait for what comes of it."""
        for message in self.fire(part, event, *data):
            if message["msg"] == "process_completed":
                return Answer(message["success"], json.dumps(message["output"]))
            if message["msg"] == "refused":
                return Answer(False, message["output"])
        raise AssertionError("the event has not ended")

    def fire(self, part: str, event: str, *data: Any) -> Iterator[dict[str, Any]]:
        """Fire an event of the page; the messages about it as they come."""
        number = self.ids[part]
        join = {
            "data": data,
            "fn_index": self.events[number, event],
            "session_hash": self.session,
            "trigger_id": number,
        }
        headers = {"Content-Type": "application/json"}
        body = json.dumps(join).encode()
        status, _, told = self.ask("POST", "/gradio_api/queue/join", body, headers)
        if status == 200:
            yield from self._messages()
        else:
            yield {"msg": "refused", "output": told.decode()}

    def _messages(self) -> Iterator[dict[str, Any]]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        try:
            connection.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
            for line in connection.getresponse():
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))
        finally:
            connection.close()

    def classify(self, path: str, tasks: Any = ("digits",), **more: Any) -> Answer:
        """Ask what is in a file that the page says was uploaded."""
        return self.call("picture", "change", told(path, **more), list(tasks))

    def memory(self) -> int:
        """Bytes of the server's memory."""
        pages = Path(f"/proc/{self.demo.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def told(path: str, **more: Any) -> dict[str, Any]:
    """A file as a page tells of it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def bomb() -> bytes:
    """A PNG of 21 KB whose pixels would take 170 MB and more."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    side = 13_000
    rows = zlib.compress(bytes((side // 8 + 2) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
