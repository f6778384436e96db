from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aoft_deploy.cli.inspect import main


def test_text_shows_one_line_per_fact(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    facts = {line[:18].strip(): line[18:] for line in out.splitlines()}
    assert facts["kind"] == "checkpoint"
    assert facts["method"] == "rlrr"
    assert facts["classes"] == "cat, dog, zürich, two words, 日本"
    assert facts["bytes"] == f"{checkpoint.stat().st_size:,}"


def test_json_shows_everything(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(artefact), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "ONNX artefact"
    assert found["manifest"] == "matches"


def test_a_file_that_is_none_of_these_is_refused(
    tmp_path: Path, backbone_weights: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "a").write_text("text")
    assert "is no checkpoint" in refused(main, tmp_path / "a")
    assert "There is no file" in refused(main, tmp_path / "missing")
    assert "There is no file" in refused(main, tmp_path)
    assert "no checkpoint of aoft-train" in refused(main, backbone_weights)


def test_a_name_that_is_too_long_for_the_system_is_refused(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert "too long" in refused(main, tmp_path / ("a" * 300))


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "--xml"]], ids=" ".join)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: aoft-inspect" in capsys.readouterr().err


COMMAND = [sys.executable, "-c", "from aoft_deploy.cli.inspect import main; exit(main())"]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "a.onnx.json"
    path.write_text(json.dumps({"artefact": "a.onnx", "rest": "x" * 200_000}))
    return path


@pytest.mark.parametrize("read_something", [True, False])
def test_a_reader_that_has_gone_is_no_crash(manifest: Path, read_something: bool) -> None:
    # The manifest needs no torch; it would be read by: aoft-inspect a.onnx.json | head -c 10
    process = subprocess.Popen([*COMMAND, manifest], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    if read_something:
        process.stdout.read(10)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert error == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_under_the_output_is_one_line(manifest: Path) -> None:
    with open("/dev/full", "wb") as full:
        process = subprocess.run([*COMMAND, manifest], stdout=full, stderr=subprocess.PIPE)
    assert process.returncode == 1
    assert process.stderr == b"error: [Errno 28] No space left on device\n"
