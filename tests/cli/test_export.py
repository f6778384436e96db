from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import run_python

from aoft_deploy.cli.export import main


def test_the_command_prints_the_paths_and_the_verification(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.safetensors"
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "timm"]
    assert main([*map(str, options), "-o", str(output)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first, second, third, fourth = out.splitlines()
    assert first == f"{output}  0.1 MiB"
    assert second.startswith("verified on 7 images at batch sizes 1, 2, 7: max |Δlogit| ")
    assert second.endswith("top-1 agreement 100.0%")
    assert third == f"manifest: {output}.json"
    assert fourth.startswith("next: ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model.ckpt"],
        ["--merge"],
        ["--merge", "model.ckpt", "--images"],
        ["--merge", "model.ckpt", "--min-agreement", "most"],
        ["--merge", "model.ckpt", "another.ckpt"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: aoft-export" in capsys.readouterr().err


def test_help_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for option in ("--merge", "--to", "--uint8", "--backbone-weights", "--force", "--images"):
        assert option in out


def test_force_accepts_other_weights_and_is_recorded_in_the_manifest(
    checkpoint: Path,
    backbone_weights: Path,
    with_metadata: Callable[..., Path],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    path = with_metadata(
        checkpoint, tmp_path / "a.ckpt", lambda data: data["backbone"].update(digest="0" * 64)
    )
    options: list[Any] = ["--merge", path, "--backbone-weights", backbone_weights, "--to", "timm"]
    line = refused(main, *options)
    assert "was trained on aoft_vit_nano with weights 000000000000, but these are" in line
    assert "--force" in line
    assert main([*map(str, options), "--force"]) == 0
    manifest = json.loads((tmp_path / "a.safetensors.json").read_text("utf-8"))
    assert manifest["forced"] is True
    assert manifest["backbone"]["digest"] != "0" * 64


def test_force_with_the_expected_weights_is_not_recorded_in_the_manifest(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a.safetensors"
    options: list[Any] = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    assert main([*map(str, options), "--to", "timm", "-o", str(output), "--force"]) == 0
    manifest = json.loads((tmp_path / "a.safetensors.json").read_text("utf-8"))
    assert manifest["forced"] is False


def test_skipped_files_in_an_image_folder_are_reported(
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "one.jpe").write_bytes(photos[0].read_bytes())
    (folder / "two.heic").touch()
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "timm"]
    options += ["-o", tmp_path / "task.safetensors", "--images", folder, folder]
    assert main([str(option) for option in options]) == 0
    note = "note: 1 file with another suffix skipped (.heic 1)."
    assert note in capsys.readouterr().err.splitlines()


def test_a_checkpoint_whose_name_is_not_utf_8_is_refused(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.ckpt")
    path.write_bytes(checkpoint.read_bytes())
    options = ["--merge", path, "--backbone-weights", backbone_weights, "--to", "timm"]
    assert "is not valid UTF-8" in refused(main, *options)


def test_an_image_whose_name_is_not_utf_8_is_in_the_manifest(
    checkpoint: Path, backbone_weights: Path, photos: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes(photos[0].read_bytes())
    output = tmp_path / "a.safetensors"
    options: list[Any] = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    options += ["--to", "timm", "-o", output, "--images", path]
    assert main([str(option) for option in options]) == 0
    manifest = json.loads((tmp_path / "a.safetensors.json").read_text("utf-8"))
    assert os.fsencode(path.name).decode("utf-8", "surrogateescape") in manifest["command"]


def running(command: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Run a command in a subprocess that handles SIGINT, even if this process ignores it."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        + options.pop("before", "")
        + f"from aoft_deploy.cli.{command} import main; sys.exit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def interrupted(number: signal.Signals, folder: Path, *options: object) -> tuple[int, str]:
    """Exit code and stderr of an export that gets a signal when it opens the written artefact."""
    send_signal = (
        "import os; sys.addaudithook(lambda event, given: os.kill(os.getpid(), "
        f"{int(number)}) if event == 'open' and given[1] == 'r' "
        "and str(given[0]).endswith('a.onnx') else None); "
    )
    code = "from aoft_deploy.cli.export import main; sys.exit(main())"
    done = run_python("-c", f"import sys; {send_signal}{code}", *options, "-o", folder / "a.onnx")
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_export_leaves_no_file(
    number: signal.Signals,
    checkpoint: Path,
    backbone_weights: Path,
    tmp_path: Path,
) -> None:
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    code, error = interrupted(number, tmp_path, *options)
    assert error == "error: Interrupted; nothing unfinished was left.\n"
    assert code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_characters_that_stdout_cannot_encode_are_escaped(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path
) -> None:
    output = tmp_path / "ä.safetensors"
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "timm"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONWARNDEFAULTENCODING": "1"}
    process = running("export", *options, "-o", output, env=environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert r"max |\u0394logit|" in out
    assert "aoft_deploy" not in err  # no warning about the locale's encoding from our files
    assert output.is_file()
