"""The command aoft-serve: its options, and its errors before it serves."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aoft_deploy.cli.serve import main, one_by_one, parser


def failed(*arguments: object) -> str:
    """Run a command that must exit with 1, and return its one-line error."""
    command = [sys.executable, "-m", "aoft_deploy.cli.serve", *map(str, arguments)]
    done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert done.returncode == 1 and done.stdout == ""
    (line,) = lines
    assert line.startswith("error: ")
    return line


def test_help_lists_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--host", "--max-batch", "--admin-token-file", "--config", "127.0.0.1", "8000"):
        assert flag in shown


@pytest.mark.parametrize("arguments", [["--port", "x"], ["--nothing"], ["--max-batch"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_a_flag_that_is_not_given_leaves_its_setting_unset(tmp_path: Path) -> None:
    options = parser().parse_args(["a.onnx", "--max-batch", "8", "--log-requests"])
    assert (options.artefacts, options.max_batch, options.log_requests) == (["a.onnx"], 8, True)
    assert options.port is None


def test_serving_without_artefacts_is_an_error() -> None:
    assert "nothing to serve" in failed()


def test_artefacts_that_cannot_be_served_are_errors(
    artefact: Path, checkpoint: Path, tmp_path: Path
) -> None:
    assert "There is no file" in failed(tmp_path / "none.onnx")
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"\x80\x04junk")
    assert "no ONNX model, or a damaged one" in failed(junk)
    assert "is a checkpoint, but no fleet is served" in failed(checkpoint)
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04.")
    assert "is no artefact of aoft-export" in failed(tmp_path / "a.pkl")
    assert "same name" in failed(artefact, artefact)
    assert "cannot be called 'a\\nb'" in failed(f"a\nb={artefact}")


def test_invalid_settings_are_errors(artefact: Path, tmp_path: Path) -> None:
    assert "--max-batch is 0: use from 1 to 4096" in failed(artefact, "--max-batch", 0)
    token = tmp_path / "token"
    assert "cannot be read" in failed(artefact, "--admin-token-file", token)
    token.write_text("short")
    assert "token of 5 bytes: use 16 or more" in failed(artefact, "--admin-token-file", token)
    assert "cannot be read as TOML" in failed("--config", tmp_path / "none.toml")
    assert "Cannot listen on 256.0.0.1" in failed(artefact, "--host", "256.0.0.1")


def test_an_address_in_use_is_an_error(artefact: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "aoft_deploy.cli.serve",
            str(artefact),
            "--port",
            str(port),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Cannot listen on 127.0.0.1" in done.stderr


def test_settings_are_read_from_a_file(
    serve: Callable[..., Any], artefact: Path, tmp_path: Path
) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(f'max-batch = 3\nartefacts = {{ "my task" = "{artefact}" }}\n')
    server = serve("--config", config)
    answer = json.loads(server.ask("GET", "/v2/models/my%20task/config")[2])
    assert (answer["name"], answer["max_batch_size"]) == ("my task", 3)
    assert server.stop() == 0


def test_a_fleet_has_one_engine(fleet_artefact: Path) -> None:
    line = failed(fleet_artefact, "--engine", "openvino")
    assert "is a fleet, which runs in the engine that it was exported for: leave --engine" in line


def test_a_fleet_runs_on_the_device_or_not_at_all(fleet_artefact: Path) -> None:
    assert "onnxruntime-gpu is not installed" in failed(fleet_artefact, "--device", "cuda")


@pytest.mark.parametrize(
    "words",
    [
        "a.onnx b.onnx --device cuda:0 cuda:1 --lanes 3",
        "--device cuda:0 cuda:1 a.onnx b.onnx --lanes 3",
        "a.onnx --device cuda:0 --lanes 3 --device cuda:1 b.onnx",
    ],
)
def test_artefacts_are_given_before_or_after_devices(words: str) -> None:
    options = parser().parse_intermixed_args(one_by_one(words.split()))
    assert options.artefacts == ["a.onnx", "b.onnx"]
    assert (options.device, options.lanes) == (["cuda:0", "cuda:1"], 3)


def test_devices_that_are_none_or_repeated_are_refused(artefact: Path) -> None:
    assert "--device has 'b.onnx': use cpu, cuda" in failed("--device", "b.onnx", artefact)
    assert "--device has cuda:0 twice" in failed(artefact, "--device", "cuda", "cuda:0")
