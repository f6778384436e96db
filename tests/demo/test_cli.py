"""The command aoft-demo."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from imported import heavy_libraries


@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--port=x", 2), ("--port=70000", 2)])
def test_the_parser_imports_no_heavy_library(option: str, code: int) -> None:
    run = f"try:\n    main(['{option}'])\nexcept SystemExit as end:\n    assert end.code == {code}"
    assert heavy_libraries(f"from aoft_demo.cli import main\n{run}") == set()


def test_a_taken_port_is_reported_with_the_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "aoft_demo.cli", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    reason = "Address already in use"
    assert done.stderr == (
        f"error: Cannot listen on 127.0.0.1:{port} ({reason}): choose another --port.\n"
    )
