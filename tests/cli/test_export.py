from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from forked import run_python
from imported import heavy_libraries
from PIL import Image

from aoft_deploy.artefacts.registry import exporter_names
from aoft_deploy.cli.export import _command, main, next_step
from aoft_deploy.cli.export_options import parser
from aoft_deploy.cli.predict import main as predict
from aoft_deploy.tuning.tuned_model import TunedModel


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
    assert second.endswith(", agreement 100.0%")
    assert third == f"manifest: {output}.json"
    assert fourth.startswith("next: ")


def test_the_last_line_loads_a_state_dict_with_timm(
    checkpoint: Path,
    make_tuned: Callable[..., TunedModel],
    backbone_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "timm"]
    output = tmp_path / "it's.safetensors"
    assert main([*map(str, options), "-o", str(output)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    model = eval(line.removeprefix("next: aoft_deploy.register(); "), {"timm": timm})
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), make_tuned("rlrr")(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("origin", ["timm", "file:vit.npz"])
def test_the_last_line_loads_an_adapter_with_peft(origin: str, tmp_path: Path) -> None:
    backbone = {"name": "vit_tiny_patch16_224", "origin": origin, "args": {"img_size": 96}}
    manifest = {"exporter": "peft", "backbone": backbone, "classes": ["a", "b"], "sha256": ""}
    (tmp_path / "lora.json").write_text(json.dumps(manifest))
    create = "timm.create_model('vit_tiny_patch16_224', num_classes=2, img_size=96"
    path = repr(str(tmp_path / "lora"))
    assert next_step(tmp_path / "lora") == (
        f"peft.PeftModel.from_pretrained({create}, pretrained=True), {path})"
        if origin == "timm"
        else f"peft.PeftModel.from_pretrained(model, {path}), where model is {create}) with the "
        "weights of the backbone (file:vit.npz)"
    )


def test_the_last_line_is_a_command_with_a_path_quoted_for_the_shell(
    fleet_artefact: Path, photos: list[Path], tmp_path: Path
) -> None:
    fleet = tmp_path / "a b.onnx"
    for suffix in ("", ".json"):
        Path(f"{fleet}{suffix}").write_bytes(Path(f"{fleet_artefact}{suffix}").read_bytes())
    first, _, second = next_step(fleet).partition(" IMAGE …, or ")
    assert shlex.split(first) == ["aoft-predict", str(fleet), "--task", "pets"]
    assert shlex.split(second) == ["aoft-serve", str(fleet)]
    assert predict([*shlex.split(first)[1:], str(photos[0])]) == 0
    (tmp_path / "model.json").write_text('{"exporter": "triton", "sha256": ""}')
    served = shlex.split(next_step(tmp_path / "model"))
    assert served == ["tritonserver", "--model-repository", str(tmp_path)]


def test_the_claim_is_what_the_images_can_show(
    checkpoint: Path,
    backbone_weights: Path,
    make_picture: Callable[..., Image.Image],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for i in range(60):
        make_picture(20, 24, seed=i).save(tmp_path / f"{i}.png")
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "-o"]
    options += [tmp_path / "a.onnx", "--precision", "fp16", "--images", tmp_path]
    assert main([str(option) for option in options]) == 0
    claim = capsys.readouterr().out.splitlines()[2]
    assert claim == (
        "60 images show an agreement of at least 95.1% (95% confidence); 299 images that all agree "
        "would show 99.0%"
    )
    report = json.loads((tmp_path / "a.onnx.json").read_text("utf-8"))["verification"]
    assert report["agreement_shown"] == pytest.approx(0.05 ** (1 / 60))


def test_wrong_names_and_paths_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").touch()
    (tmp_path / "model-int8.onnx").touch()
    (tmp_path / "photo.png").touch()
    merge = ["--merge", str(tmp_path / "model.ckpt")]
    wrong = [
        [*merge, "--to", "onx"],
        [*merge, "--precision", "int7"],
        [*merge, "--to", "timm", "--opset", "20"],
        [*merge, "--to", "triton", "--batches", "1", "8"],
        [*merge, "--to", "triton", "--batches", "8", "4", "2"],
        [*merge, "--precision", "int8", "--images", str(tmp_path)],
        [*merge, "--to", "auto", "-o", "model.onnx"],
        ["--merge", str(tmp_path / "missing.ckpt")],
        ["--fleet", str(tmp_path / "model.ckpt"), "--form", "mixd"],
        ["--fleet", str(tmp_path / "model.ckpt"), "--to", "peft"],
        ["--fleet", str(tmp_path / "model.ckpt"), "--precision", "int8", "--form", "folded"],
    ]
    script = (
        "from aoft_deploy.cli.export import main\n"
        f"for words in {wrong!r}:\n    assert main(words) == 1, words"
    )
    assert not heavy_libraries(script) & {"torch", "timm"}


def test_the_help_lists_every_exporter(capsys: pytest.CaptureFixture[str]) -> None:
    help_text = " ".join(parser().format_help().replace("-\n", "-").split())
    for name in exporter_names():
        assert f"{name}, " in help_text.replace("triton- tensorrt", "triton-tensorrt")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model.ckpt"],
        ["--merge"],
        ["--merge", "model.ckpt", "--images"],
        ["--merge", "model.ckpt", "--min-agreement", "most"],
        ["--merge", "model.ckpt", "another.ckpt", "--output", "a.onnx"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "(see aoft-export --help)" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    "line",
    [
        "aoft-export --merge 'a b' --to auto --images x 'y z' --uint8 --min-agreement 0.5 --force",
        "aoft-export --fleet a b --form mixed --precision int8 --images q -o f.onnx --batches 1 8",
    ],
)
def test_a_command_that_is_offered_has_the_options_given(line: str) -> None:
    options = parser().parse_args(shlex.split(line)[1:])
    assert parser().parse_args(shlex.split(_command(options))[1:]) == options
