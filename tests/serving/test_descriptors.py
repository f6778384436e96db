"""The number of connections that descriptors allow, and health checks of a full server."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from aoft_deploy.serving.transport.descriptors import RESERVED

POSSIBLE = """
import resource, sys
from aoft_deploy.serving.transport.descriptors import connections_possible
try:
    print(connections_possible(int(sys.argv[1])), *resource.getrlimit(resource.RLIMIT_NOFILE))
except Exception as error:
    print(type(error).__name__, error)
"""


def possible(wanted: int, soft: int, hard: int) -> tuple[str, str]:
    """Output and log of a new process with these limits."""
    shell = f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$0" -c "$1" "$2"'
    command = ["bash", "-c", shell, sys.executable, POSSIBLE, str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_the_soft_limit_is_raised_as_far_as_needed() -> None:
    output, log = possible(1024, 512, 4096)
    count, soft, hard = map(int, output.split())
    assert (count, hard, log) == (1024, 4096, "")
    assert 1024 + RESERVED < soft <= 1024 + RESERVED + 20


def test_a_sufficient_descriptor_limit_is_not_changed() -> None:
    assert possible(100, 4000, 4096) == ("100 4000 4096", "")


def test_a_hard_limit_reduces_the_number_of_connections() -> None:
    output, log = possible(1024, 512, 1024)
    count, soft, hard = map(int, output.split())
    assert soft == hard == 1024 and 1024 - RESERVED - 20 <= count < 1024 - RESERVED
    assert '"event":"fewer connections","wanted":1024' in log and f'"possible":{count}' in log


def test_too_few_descriptors_are_refused() -> None:
    output, _ = possible(10, 100, RESERVED)
    assert output.startswith(f"SettingError This process may open {RESERVED} files, which leaves")
    assert "(ulimit -n)" in output


@pytest.fixture
def many() -> Any:
    """Allow this process many connections during a test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("hard", [4096, 640])
def test_every_promised_connection_and_health_checks_have_descriptors(
    serve: Callable[..., Any], artefact: Path, many: None, hard: int
) -> None:
    server = serve(artefact, shell=f"ulimit -Sn 256 && ulimit -Hn {hard}")
    fewer = [event for event in server.events if event["event"] == "fewer connections"]
    most = fewer[0]["possible"] if fewer else 1024
    assert bool(fewer) is (hard < 1024) and most > 400
    with ExitStack() as held:
        connections = [
            held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            for _ in range(most)
        ]
        for connection in connections:
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n")
        for connection in connections:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        for _ in range(3):
            assert server.ask("GET", "/v2/health/live")[0] == 200
            assert server.ask("GET", "/v2/health/ready")[0] == 200
            assert server.refused("GET", "/v2") == (503, "Too many connections.")
        burst = [
            held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            for _ in range(400)
        ]
        assert server.ask("GET", "/v2/health/live")[0] == 200
        for connection in burst[:-16]:
            assert connection.recv(4096).startswith(b"HTTP/1.1 503")
    assert server.process.poll() is None
    assert not [event for event in server.events if event["event"] == "library"]
    assert server.stop() == 0
