"""aoft-export --to auto."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.cli.export import main
from aoft_deploy.cli.predict import main as predict
from aoft_deploy.errors import OutputError, UnknownNameError
from aoft_deploy.export.fastest import CANDIDATES, export_fastest
from aoft_deploy.export.race import Candidate, Timed
from aoft_deploy.fleet.fleet import Fleet


@pytest.fixture(scope="module")
def many(
    make_picture: Callable[..., Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder: Path = tmp_path_factory.mktemp("many")
    for i in range(20):
        make_picture(20 + i % 7, 24, seed=100 + i).save(folder / f"{i:02}.png")
    return folder


def test_the_fastest_verified_candidate_is_kept_and_all_are_reported(
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    many: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "auto"]
    options += ["--images", photos[0].parent, "--calibrate", many, "--min-agreement", "0.5"]
    options += ["--batches", 3, 1]
    assert main([str(option) for option in [*options, "-o", tmp_path / "task"]]) == 0
    out = capsys.readouterr().out
    artefact, manifest = sorted(tmp_path.iterdir())
    assert manifest.name == artefact.name + ".json"
    contents = json.loads(manifest.read_text("utf-8"))
    chosen = contents["chosen"]
    assert out.startswith(f"criterion: {chosen['criterion']}\n")
    among = chosen["among"]
    assert [(entry["exporter"], entry["precision"]) for entry in among] == list(CANDIDATES)
    ratios = {
        (entry["exporter"], entry["precision"]): entry["ratios"]
        for entry in among
        if "ratios" in entry
    }
    assert ratios["onnx", "fp32"] == {"1": 1, "3": 1}
    best = contents["exporter"], contents["precision"]
    assert all(ratio >= 1 for ratio in ratios[best].values())
    assert chosen["machine"]["processor"]
    precision = "" if best[1] == "fp32" else f"-{best[1]}"
    assert contents["artefact"] == artefact.name == f"task{precision}.{best[0]}"
    assert load_artefact(artefact).info["precision"] == best[1]
    for to, precision in CANDIDATES:
        assert f"\n{to} {precision}: " in out
    left_out = [entry for entry in among if "ratios" not in entry]
    assert all(entry["left_out"] for entry in left_out)
    assert predict([str(artefact), str(photos[0])]) == 0


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[int, float]]:
    """Ratios that replace the measured ones, by candidate; other candidates get 1."""
    ratios: dict[str, dict[int, float]] = {}

    def fixed(artefacts: dict[str, Path], batches: Sequence[int], goal: str) -> dict[str, Timed]:
        return {
            name: Timed({batch: ratios.get(name, {}).get(batch, 1.0) for batch in batches})
            for name in artefacts
        }

    monkeypatch.setattr("aoft_deploy.export.fastest.timed", fixed)
    return ratios


@pytest.fixture
def onnx_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only ONNX candidates, because exports take time."""
    monkeypatch.setattr("aoft_deploy.export.fastest.CANDIDATES", CANDIDATES[:2])


def auto(
    checkpoint: Path, weights: Path, output: Path, *more: object, images: Sequence[Path] = ()
) -> list[str]:
    """Arguments of an export with --to auto."""
    words = ["--merge", checkpoint, "--backbone-weights", weights, "--to", "auto", "-o", output]
    words += ["--images", *images, "--min-agreement", "0"] if images else []
    return [str(word) for word in [*words, *more]]


def contents(folder: Path) -> dict[str, bytes]:
    """Contents of all files in a folder and its subfolders, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_batch_sizes_asked_decide_and_what_is_faster_elsewhere_is_offered(
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    rates: dict[str, dict[int, float]],
    onnx_only: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rates["onnx int8"] = {1: 1.53, 8: 0.84}
    words = auto(checkpoint, backbone_weights, tmp_path / "a b", images=photos[:1])
    assert main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert "onnx int8: 1.53× at batch 1, 0.84× at batch 8; slower than fp32 at batch 8" in out
    assert "chosen: onnx fp32" in out
    assert "fastest at batch 8: onnx fp32" in out
    (offer,) = (line for line in out if line.startswith("fastest at batch 1: onnx int8, 1.53×"))
    offered = offer.partition("; by ")[2]
    capsys.readouterr()
    assert main(shlex.split(offered)[1:]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a b.onnx", "a b.onnx.json", "a b-int8.onnx", "a b-int8.onnx.json"}
    chosen = json.loads((tmp_path / "a b.onnx.json").read_text("utf-8"))["chosen"]
    assert chosen["fastest"] == {"1": "onnx int8", "8": "onnx fp32"}

    assert main([*words, "--batches", "1", "--overwrite"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "chosen: onnx int8" in out
    assert [line for line in out if "fastest at" in line][1:] == ["fastest at batch 1: onnx int8"]
    manifest = json.loads((tmp_path / "a b-int8.onnx.json").read_text("utf-8"))
    assert manifest["chosen"]["batches"] == [1]


@pytest.mark.parametrize("name", ["task.onnx", "task.onnx.json", "task.openvino.json"])
def test_an_existing_file_of_a_possible_name_is_not_replaced_without_overwrite(
    name: str,
    checkpoint: Path,
    backbone_weights: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    (tmp_path / name).write_text("precious")
    message = refused(main, *auto(checkpoint, backbone_weights, tmp_path / "task"))
    assert f"{name} exists: give another --output" in message
    assert "There is no file" in refused(main, "--merge", tmp_path / "no.ckpt", "--to", "auto")


def test_overwrite_replaces_only_the_artefact_of_the_chosen_exporter_and_precision(
    checkpoint: Path,
    backbone_weights: Path,
    rates: dict[str, dict[int, float]],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    for name in ("task.onnx", "task-int8.onnx"):
        (tmp_path / name).write_text("precious")
    rates["openvino fp32"] = {1: 2.0, 8: 2.0}
    words = [*auto(checkpoint, backbone_weights, tmp_path / "task"), "--overwrite"]
    assert main(words) == 0
    manifest = tmp_path / "task.openvino.json"
    first = manifest.stat().st_mtime_ns
    assert main(words) == 0
    assert manifest.stat().st_mtime_ns > first
    assert load_artefact(tmp_path / "task.openvino").info["precision"] == "fp32"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"task.onnx", "task-int8.onnx", "task.openvino", "task.openvino.json"}
    for name in ("task.onnx", "task-int8.onnx"):
        assert (tmp_path / name).read_text() == "precious"


def test_a_file_that_appears_during_the_export_is_not_replaced(
    checkpoint: Path,
    backbone_weights: Path,
    rates: dict[str, dict[int, float]],
    onnx_only: None,
    tmp_path: Path,
) -> None:
    def progress(candidate: Candidate) -> None:
        (tmp_path / "task.onnx").write_text("precious")

    with pytest.raises(OutputError, match=r"task\.onnx exists"):
        export_fastest(
            checkpoint,
            tmp_path / "task",
            progress=progress,
            backbone=BackboneSource(weights=backbone_weights),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["task.onnx"]
    assert (tmp_path / "task.onnx").read_text() == "precious"


def test_auto_never_overwrites_an_input(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    weights = tmp_path / "task.onnx"
    weights.write_bytes(backbone_weights.read_bytes())
    words = auto(checkpoint, weights, tmp_path / "task", "--overwrite")
    assert "is an input of this export" in refused(main, *words)
    assert weights.read_bytes() == backbone_weights.read_bytes()


@pytest.mark.parametrize("output", ["task.onnx", "task.openvino", ".", ".."])
def test_an_output_with_a_suffix_is_refused(
    output: str, checkpoint: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / output if output.startswith("task") else Path(output)
    message = refused(main, "--merge", checkpoint, "--to", "auto", "-o", path)
    assert "chooses between .onnx and .openvino" in message


def test_without_images_only_fp32_is_tried(
    checkpoint: Path, backbone_weights: Path, rates: dict[str, dict[int, float]], tmp_path: Path
) -> None:
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "auto"]
    assert main([str(option) for option in [*options, "-o", tmp_path / "task"]]) == 0
    (manifest,) = tmp_path.glob("*.json")
    contents = json.loads(manifest.read_text("utf-8"))
    assert contents["precision"] == "fp32"
    reasons = {e["precision"]: e.get("left_out") for e in contents["chosen"]["among"]}
    assert reasons == {
        "fp32": None,
        "int8": "needs `images` to be judged on",
        "bf16": "needs `images` to be judged on",
    }


@pytest.mark.parametrize("option", [["--precision", "int8"], ["--opset", "20"]])
def test_options_that_auto_chooses_are_refused(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--merge", "a.ckpt", "--to", "auto", *option])
    assert ended.value.code == 2
    assert f"{option[0]} does not go with --to auto" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--merge", "a.ckpt", "--goal", "throughput"], "--goal goes with --to auto"),
        (["--fleet", "a.ckpt", "--to", "auto", "--uint8"], "--uint8 does not go with --fleet"),
        (["--fleet", "a.ckpt", "--to", "auto", "--opset", "20"], "--opset does not go with --to a"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_goal_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnknownNameError, match=r"Unknown goal 'energy'\. Known: latency, throughput"
    ):
        export_fastest(checkpoint, tmp_path / "task", goal="energy")


def test_the_fastest_fleet_is_chosen_for_several_batches_at_once(
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    tasks = [tmp_path / f"t{number}.ckpt" for number in (1, 2)]
    for task in tasks:
        task.write_bytes(make_checkpoint("aoft-lora-star").read_bytes())
    words = ["--fleet", *tasks, "--backbone-weights", backbone_weights, "--to", "auto"]
    words += ["--goal", "throughput", "--batches", "2", "-o", tmp_path / "out" / "many"]
    assert main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    artefact, manifest = sorted((tmp_path / "out").iterdir())
    chosen = json.loads(manifest.read_text("utf-8"))["chosen"]
    assert chosen["goal"] == "throughput" and chosen["lanes"] >= 1
    timed = [(each["exporter"], each["precision"]) for each in chosen["among"] if "ratios" in each]
    assert timed == [("onnx", "fp32"), ("openvino", "fp32")]
    lanes = f" --lanes {chosen['lanes']}" if chosen["lanes"] > 1 else ""
    assert out.endswith(f"aoft-serve {artefact}{lanes}\n")
    assert {*Fleet(artefact).tasks} == {"t1", "t2"}


def test_a_batch_size_below_1_is_refused(
    checkpoint: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    line = refused(main, "--merge", checkpoint, "--to", "auto", "--batches", 0, 8)
    assert line == "--batches must be one or more batch sizes from 1."
