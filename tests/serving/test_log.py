"""Logging never fails and never blocks, whether or not anybody reads the log."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_model import BODY

from aoft_deploy.serving.log import MAX_KINDS, MAX_RECORDS, PERIOD_SECONDS, JsonHandler, Writer, log


class Broken:
    """A stream whose reader has ended."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")


class Full(Broken):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stream", [Broken(), Full(), None])
def test_a_failing_stream_does_not_raise(
    stream: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    log("one", error=ValueError("two"))
    with (tmp_path / "closed").open("w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
    log("three")


class Mute:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "value", ["\ud800", 2**70, b"\xff", {1: 2}, object(), Mute(), float("nan"), Path("a\udcff")]
)
def test_every_log_entry_is_one_line_of_json(
    value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    log("example", error=ValueError(value), value=value)
    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert event["event"] == "example" and event["error"].startswith("ValueError: ")


def test_a_slow_log_reader_delays_nothing_and_gets_the_count_of_lost_lines() -> None:
    gate, begun = threading.Event(), threading.Event()
    written = list[bytes]()

    def write(line: bytes) -> None:
        begun.set()
        assert gate.wait(60)
        written.append(line)

    writer = Writer(write, max_lines=3)
    writer.put(b"0\n")
    assert begun.wait(60)
    for number in range(1, 9):
        writer.put(b"%d\n" % number)  # returns although nobody reads
    gate.set()
    writer.close(60)
    assert written[0] == b"0\n" and written[-1] == b"3\n"
    (event,) = [json.loads(line) for line in written if line.startswith(b"{")]
    assert (event["event"], event["count"]) == ("log lines lost", 5)


def test_lines_that_could_not_be_written_are_counted() -> None:
    written, fails = list[bytes](), [True, True, False, False, False]

    def write(line: bytes) -> None:
        if fails.pop(0):
            raise OSError(28, "No space left on device")
        written.append(line)

    writer = Writer(write)
    for number in range(3):
        writer.put(b"%d\n" % number)
    writer.close(60)
    assert json.loads(written[0])["count"] == 2 and written[1:] == [b"2\n"]


def test_the_wait_for_a_slow_log_reader_is_bounded() -> None:
    gate = threading.Event()
    writer = Writer(lambda line: gate.wait(60), max_lines=1)
    for _ in range(3):
        writer.put(b"x\n")
    writer.close(0.01)
    gate.set()


@pytest.fixture
def library() -> Any:
    """A library's logger with a JSON handler, and a clock that does not advance."""
    now = [0.0]
    logger = logging.getLogger("tests.library")
    logger.handlers, logger.propagate = [JsonHandler(lambda: now[0])], False
    yield logger, now
    logger.handlers, logger.propagate = [], True


def test_a_library_logs_few_records_of_a_kind_per_minute(
    library: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    logger, now = library
    for number in range(2048):
        logger.error("no descriptor\nsocket: %d", number)
    logger.error("another")
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert len(events) == MAX_RECORDS + 1 and events[-1]["message"] == "another"
    assert events[0]["logger"] == "tests.library" and events[0]["message"].endswith("socket: 0")
    now[0] += PERIOD_SECONDS - 0.001
    logger.error("no descriptor")
    assert capsys.readouterr().err == ""
    now[0] += 0.001
    logger.error("no descriptor")
    summary, event = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert summary["left_out"] == 2049 - MAX_RECORDS and event["message"] == "no descriptor"


def test_a_library_with_ever_new_messages_is_limited(
    library: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    logger, _ = library
    for number in range(5000):
        logger.error(f"problem {number}")
    assert len(capsys.readouterr().err.splitlines()) == MAX_KINDS + MAX_RECORDS


def test_a_record_with_wrong_arguments_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("a", logging.ERROR, "a.py", 1, "%d of %d", ("a",), None)
    JsonHandler().handle(record)
    assert json.loads(capsys.readouterr().err)["message"] == "%d of %d"


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(until: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)


def asked(port: int, method: str = "GET", path: str = "/v2/health/ready") -> int:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, BODY if method == "POST" else None)
        response = connection.getresponse()
        response.read()
        return response.status
    except OSError:
        return 0
    finally:
        connection.close()


def slow_pipe() -> int:
    """The writing end of a small pipe that is open but not read."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.set_inheritable(reading, False)
    PIPES.append(reading)
    return writing


def dead_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


PIPES: list[int] = []
STREAMS: dict[str, Callable[[], int]] = {
    "nobody reads": dead_pipe,
    "the reader sleeps": slow_pipe,
    "the disk is full": lambda: os.open("/dev/full", os.O_WRONLY),
}


@pytest.mark.parametrize("stream", [*STREAMS, "it is closed"])
def test_a_log_without_a_reader_stops_neither_watching_nor_requests(
    stream: str, artefact: Path, tmp_path: Path
) -> None:
    folder, port = tmp_path / "repository", free()
    folder.mkdir()
    command = [sys.executable, "-m", "aoft_deploy.cli.serve", f"task={artefact}", "--threads", "1"]
    command += ["--repository", str(folder), "--follow", "0.1", "--port", str(port)]
    command += ["--log-requests"]
    target = STREAMS[stream]() if stream in STREAMS else -1
    if target < 0:
        command = ["sh", "-c", 'exec "$0" "$@" 2>&-', *command]
    process = subprocess.Popen(command, stderr=target if target >= 0 else None)
    try:
        wait(lambda: asked(port) == 200)
        for _ in range(60):  # more lines than a small pipe holds
            assert asked(port, "POST", "/v2/models/task/infer") == 200
        (folder / "bad.onnx").write_bytes(b"junk")  # which is logged
        (folder / "other.onnx").write_bytes(artefact.read_bytes())
        wait(lambda: asked(port, "POST", "/v2/models/other/infer") == 200)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        if target >= 0:
            os.close(target)
        while PIPES:
            os.close(PIPES.pop())


def test_no_connection_gets_the_descriptor_of_a_closed_stream(artefact: Path) -> None:
    port = free()
    command = [sys.executable, "-m", "aoft_deploy.cli.serve", f"task={artefact}", "--threads", "1"]
    shell = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *command, "--port", str(port)]
    process = subprocess.Popen(shell)
    try:
        wait(lambda: asked(port) == 200)
        for number in range(3):
            assert os.readlink(f"/proc/{process.pid}/fd/{number}") == os.devnull
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
