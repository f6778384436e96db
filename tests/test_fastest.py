"""aoft-export --to auto."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aoft_deploy.cli.export import main
from aoft_deploy.cli.predict import main as predict
from aoft_deploy.engines import load_artefact
from aoft_deploy.fastest import CANDIDATES


@pytest.fixture(scope="module")
def many(
    make_picture: Callable[..., Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder: Path = tmp_path_factory.mktemp("many")
    for i in range(20):
        make_picture(20 + i % 7, 24, seed=100 + i).save(folder / f"{i:02}.png")
    return folder


def test_the_fastest_way_that_holds_is_kept_and_the_others_are_told(
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    many: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "auto"]
    options += ["--images", photos[0].parent, "--calibrate", many, "--min-agreement", "0.5"]
    assert main([str(option) for option in [*options, "-o", tmp_path / "task"]]) == 0
    out = capsys.readouterr().out
    artefact, manifest = sorted(tmp_path.iterdir())
    assert manifest.name == artefact.name + ".json"
    contents = json.loads(manifest.read_text("utf-8"))
    among = contents["chosen"]["among"]
    assert [(entry["exporter"], entry["precision"]) for entry in among] == list(CANDIDATES)
    ratios = {
        (entry["exporter"], entry["precision"]): np.prod(entry["ratios"])
        for entry in among
        if "ratios" in entry
    }
    assert ratios["onnx", "fp32"] == 1
    best = max(ratios, key=lambda key: ratios[key])
    assert (contents["exporter"], contents["precision"]) == best
    assert contents["artefact"] == artefact.name == f"task.{best[0]}"
    assert load_artefact(artefact).info["precision"] == best[1]
    for to, precision in CANDIDATES:
        assert f"tried {to} {precision}: " in out
    left = [entry for entry in among if "ratios" not in entry]
    assert all(entry["left_out"] for entry in left)
    assert predict([str(artefact), str(photos[0])]) == 0


def test_without_images_only_fp32_is_tried(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path
) -> None:
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "auto"]
    assert main([str(option) for option in [*options, "-o", tmp_path / "task"]]) == 0
    (manifest,) = tmp_path.glob("*.json")
    contents = json.loads(manifest.read_text("utf-8"))
    assert contents["precision"] == "fp32"
    reasons = {e["precision"]: e.get("left_out") for e in contents["chosen"]["among"]}
    assert reasons == {
        "fp32": None,
        "int8": "needs --images to be judged on",
        "bf16": "needs --images to be judged on",
    }


def test_what_stands_in_the_way_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "task.openvino").mkdir()
    (tmp_path / "task.openvino" / "notes.txt").touch()
    options = ["--merge", checkpoint, "--to", "auto", "-o", tmp_path / "task"]
    assert "exists and is no empty folder" in refused(main, *options)
    assert "There is no file" in refused(main, "--merge", tmp_path / "no.ckpt", "--to", "auto")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["task.openvino"]


@pytest.mark.parametrize("option", [["--precision", "int8"], ["--opset", "20"]])
def test_what_auto_decides_is_not_to_be_given(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--merge", "a.ckpt", "--to", "auto", *option])
    assert ended.value.code == 2
    assert f"{option[0]} does not go with --to auto" in capsys.readouterr().err
