"""aoft-export --to auto."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.cli.export import main
from aoft_deploy.cli.predict import main as predict
from aoft_deploy.errors import OutputError
from aoft_deploy.export.fastest import CANDIDATES, Candidate, choose, export_fastest


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
    assert main([str(option) for option in [*options, "-o", tmp_path / "task"]]) == 0
    out = capsys.readouterr().out
    artefact, manifest = sorted(tmp_path.iterdir())
    assert manifest.name == artefact.name + ".json"
    contents = json.loads(manifest.read_text("utf-8"))
    among = contents["chosen"]["among"]
    assert [(entry["exporter"], entry["precision"]) for entry in among] == list(CANDIDATES)
    ratios = {
        (entry["exporter"], entry["precision"]): entry["ratios"]
        for entry in among
        if "ratios" in entry
    }
    assert ratios["onnx", "fp32"] == [1, 1]
    best = contents["exporter"], contents["precision"]
    assert all(ratio >= 1 for ratio in ratios[best])
    assert contents["chosen"]["machine"]["processor"]
    assert contents["artefact"] == artefact.name == f"task.{best[0]}"
    assert load_artefact(artefact).info["precision"] == best[1]
    for to, precision in CANDIDATES:
        assert f"tried {to} {precision}: " in out
    left_out = [entry for entry in among if "ratios" not in entry]
    assert all(entry["left_out"] for entry in left_out)
    assert predict([str(artefact), str(photos[0])]) == 0


def chosen_of(**ratios: tuple[float, float]) -> str:
    """The choice among candidates named ``exporter_precision``."""
    names = {name: name.partition("_") for name in ratios}
    timed = [Candidate(to, kind, ratios[name]) for name, (to, _, kind) in names.items()]
    best, judged = choose(timed)
    assert {(c.to, c.precision) for c in judged} == {(c.to, c.precision) for c in timed}
    return f"{best.to}_{best.precision}"


@pytest.mark.parametrize(
    ("ratios", "wanted"),
    [
        # 3.1 · 0.84 is far above 1, but at batch 8 it is slower
        ({"onnx_fp32": (1, 1), "onnx_int8": (3.1, 0.84)}, "onnx_fp32"),
        ({"onnx_fp32": (1, 1), "onnx_int8": (0.99, 5)}, "onnx_fp32"),
        ({"onnx_fp32": (1, 1), "onnx_int8": (1, 1.01)}, "onnx_int8"),
        ({"onnx_fp32": (1, 1), "openvino_fp32": (4, 0.9)}, "onnx_fp32"),
        ({"onnx_fp32": (1, 1), "openvino_fp32": (1.1, 1.2)}, "openvino_fp32"),
        # slower than the other runtime's fp32
        (
            {"onnx_fp32": (1, 1), "openvino_fp32": (2, 2), "openvino_int8": (6, 1.9)},
            "openvino_fp32",
        ),
        (
            {"onnx_fp32": (1, 1), "openvino_fp32": (2, 2), "openvino_int8": (2.1, 2)},
            "openvino_int8",
        ),
        # the other runtime's fp32 is slower at batch 1, so int8 is not compared with it
        (
            {"onnx_fp32": (1, 1), "openvino_fp32": (0.9, 3), "onnx_int8": (1.5, 2)},
            "onnx_int8",
        ),
        ({"onnx_fp32": (1, 1), "onnx_int8": (2, 3), "openvino_bf16": (3, 1.9)}, "onnx_int8"),
        ({"onnx_fp32": (1, 1), "onnx_int8": (2, 2), "openvino_bf16": (3, 1.9)}, "openvino_bf16"),
        ({"openvino_fp32": (1, 1), "openvino_int8": (0.5, 9)}, "openvino_fp32"),
    ],
)
def test_the_choice_is_not_slower_than_fp32_at_any_batch_size(
    ratios: dict[str, tuple[float, float]], wanted: str
) -> None:
    assert chosen_of(**ratios) == wanted


def test_the_manifest_lists_the_batch_sizes_at_which_a_candidate_is_slower() -> None:
    fast, slow = Candidate("onnx", "fp32", (1, 1)), Candidate("onnx", "int8", (3, 0.84))
    _, judged = choose([fast, slow])
    assert [c.to_dict().get("slower_than_fp32_at") for c in judged] == [None, [8]]


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float]]:
    """Ratios that replace the measured ones, by exporter and precision; other candidates get 1."""
    ratios: dict[str, tuple[float, float]] = {}

    def timed(drafts: dict[Candidate, object]) -> list[Candidate]:
        return [
            Candidate(c.to, c.precision, ratios=ratios.get(f"{c.to} {c.precision}", (1.0, 1.0)))
            for c in drafts
        ]

    monkeypatch.setattr("aoft_deploy.export.fastest._timed", timed)
    return ratios


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


@pytest.mark.parametrize("name", ["task.onnx", "task.onnx.json", "task.openvino.json"])
def test_an_existing_file_is_not_replaced_without_overwrite(
    name: str,
    checkpoint: Path,
    backbone_weights: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    (tmp_path / name).write_text("precious")
    message = refused(main, *auto(checkpoint, backbone_weights, tmp_path / "task"))
    assert name in message and "--overwrite" in message
    assert contents(tmp_path) == {name: b"precious"}
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("gone")
    assert "--overwrite" in refused(main, *auto(checkpoint, backbone_weights, tmp_path / "task"))


def test_an_existing_artefact_is_replaced_only_with_overwrite(
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    rates: dict[str, tuple[float, float]],
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    assert main([str(word) for word in [*words, "-o", tmp_path / "task.onnx"]]) == 0
    before = contents(tmp_path)
    rates["onnx int8"] = (3.0, 3.0)
    again = auto(checkpoint, backbone_weights, tmp_path / "task", images=photos[:1])
    assert "--overwrite" in refused(main, *again)
    assert contents(tmp_path) == before
    assert main([*again, "--overwrite"]) == 0
    assert json.loads((tmp_path / "task.onnx.json").read_text())["precision"] == "int8"
    assert sorted(contents(tmp_path)) == ["task.onnx", "task.onnx.json"]
    assert load_artefact(tmp_path / "task.onnx").info["precision"] == "int8"
    rates["onnx int8"] = (3.0, 0.84)
    capsys.readouterr()
    assert main([*again, "--overwrite"]) == 0
    assert json.loads((tmp_path / "task.onnx.json").read_text())["precision"] == "fp32"
    assert (
        "3.00× and 0.84× at batch 1 and 8; slower than fp32 at batch 8" in capsys.readouterr().out
    )


def test_a_file_that_appears_during_the_export_is_not_replaced(
    checkpoint: Path,
    backbone_weights: Path,
    rates: dict[str, tuple[float, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
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
    assert contents(tmp_path) == {"task.onnx": b"precious"}


def test_a_folder_is_replaced_completely_or_not_at_all(
    checkpoint: Path,
    backbone_weights: Path,
    rates: dict[str, tuple[float, float]],
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates["openvino fp32"] = (2.0, 2.0)
    words = auto(checkpoint, backbone_weights, tmp_path / "task")
    assert main(words) == 0
    first = contents(tmp_path)
    manifest = tmp_path / "task.openvino.json"
    assert "task.openvino exists" in refused(main, *words)

    def full(*arguments: object) -> None:
        raise OutputError("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr("aoft_deploy.export.fastest.publish", full)
        assert "disk is full" in refused(main, *words, "--overwrite")
    assert contents(tmp_path) == first
    assert main([*words, "--overwrite"]) == 0
    again = contents(tmp_path)
    assert sorted(again) == sorted(first) and again[manifest.name] != first[manifest.name]
    assert load_artefact(tmp_path / "task.openvino").info["precision"] == "fp32"

    notes = tmp_path / "task.openvino" / "notes.txt"
    notes.write_text("precious")
    assert "was changed" in refused(main, *words, "--overwrite")
    notes.unlink()
    manifest.unlink()
    assert "no manifest" in refused(main, *words, "--overwrite")
    assert set(contents(tmp_path)) == set(first) - {manifest.name}


def test_overwrite_keeps_artefacts_of_other_exporters(
    checkpoint: Path,
    backbone_weights: Path,
    rates: dict[str, tuple[float, float]],
    tmp_path: Path,
) -> None:
    rates["openvino fp32"] = (2.0, 2.0)
    words = auto(checkpoint, backbone_weights, tmp_path / "task")
    assert main(words) == 0
    first = contents(tmp_path)
    rates["openvino fp32"] = (0.5, 0.5)
    assert main([*words, "--overwrite"]) == 0
    after = contents(tmp_path)
    assert {name: after[name] for name in first} == first
    assert set(after) - set(first) == {"task.onnx", "task.onnx.json"}


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


@pytest.mark.parametrize("other", [["--merge", "a.ckpt"], ["--fleet", "a.ckpt"]])
def test_overwrite_without_auto_is_refused(
    other: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*other, "--overwrite"])
    assert ended.value.code == 2
    assert "--overwrite goes with --to auto" in capsys.readouterr().err


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
        "int8": "needs `images` to be judged on",
        "bf16": "needs `images` to be judged on",
    }


def test_existing_paths_are_refused_before_the_export_starts(
    checkpoint: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "task.openvino").mkdir()
    (tmp_path / "task.openvino" / "notes.txt").touch()
    options = ["--merge", checkpoint, "--to", "auto", "-o", tmp_path / "task"]
    assert "exists, and --to auto may choose that name" in refused(main, *options)
    assert "There is no file" in refused(main, "--merge", tmp_path / "no.ckpt", "--to", "auto")
    overwriting = [*options, "--overwrite"]
    assert "exists and is no empty folder" in refused(main, *overwriting)
    assert [path.name for path in tmp_path.rglob("*")] == ["task.openvino", "notes.txt"]


@pytest.mark.parametrize("option", [["--precision", "int8"], ["--opset", "20"]])
def test_options_that_auto_chooses_are_refused(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--merge", "a.ckpt", "--to", "auto", *option])
    assert ended.value.code == 2
    assert f"{option[0]} does not go with --to auto" in capsys.readouterr().err
