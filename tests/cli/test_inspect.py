from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from aoft_deploy import approximately_orthogonal
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.cli.inspect import main
from aoft_deploy.drawing import DPI
from aoft_deploy.training.analysis.orthogonality import orthogonality
from aoft_deploy.training.analysis.plots import COLOURS


def test_the_text_output_has_one_line_per_entry(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(checkpoint)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    entries = {line[:18].strip(): line[18:] for line in out.splitlines()}
    assert entries["kind"] == "checkpoint"
    assert entries["method"] == "rlrr"
    assert entries["classes"] == "cat, dog, zürich, two words, 日本"
    assert entries["bytes"] == f"{checkpoint.stat().st_size:,}"


def test_the_json_output_is_the_description(
    artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(artefact), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "ONNX artefact"
    assert found["manifest"] == "matches"


def test_a_file_of_another_kind_is_refused(
    tmp_path: Path, backbone_weights: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "a").write_text("text")
    assert "is no checkpoint" in refused(main, tmp_path / "a")
    assert "There is no file" in refused(main, tmp_path / "missing")
    assert "is a folder without a model" in refused(main, tmp_path)
    assert "is a file of weights, such as a backbone's" in refused(main, backbone_weights)


def test_a_name_that_is_too_long_for_the_system_is_refused(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert "too long" in refused(main, tmp_path / ("a" * 300))


@pytest.mark.parametrize(
    "arguments",
    [[], ["a", "b"], ["a", "--xml"], ["a", "--force"], ["a", "--backbone", "b"], ["a", "--plots"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "(see aoft-inspect --help)" in capsys.readouterr().err


COMMAND = [sys.executable, "-c", "from aoft_deploy.cli.inspect import main; exit(main())"]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "a.onnx.json"
    path.write_text(json.dumps({"artefact": "a.onnx", "rest": "x" * 200_000}))
    return path


@pytest.mark.parametrize("read_something", [True, False])
def test_a_closed_output_pipe_is_not_a_crash(manifest: Path, read_something: bool) -> None:
    # As in: aoft-inspect a.onnx.json | head -c 10
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
def test_a_full_disk_is_a_one_line_error(manifest: Path) -> None:
    with open("/dev/full", "wb") as full:
        process = subprocess.run([*COMMAND, manifest], stdout=full, stderr=subprocess.PIPE)
    assert process.returncode == 1
    assert process.stderr == b"error: [Errno 28] No space left on device\n"


# --plots


@pytest.fixture(scope="module")
def run(
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a finished training run of three epochs."""
    folder = tmp_path_factory.mktemp("run")
    settings: dict[str, Any] = {"rank": 6, "targets": ["q", "v", "fc1"]}
    (folder / "model.ckpt").write_bytes(make_checkpoint("aoft-lora-star", **settings).read_bytes())
    last = orthogonality(load(folder / "model.ckpt", weights=backbone_weights))
    lines = [{"epoch": i, "lr": 0.1, **{k: v * i / 3 for k, v in last.items()}} for i in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def plots(source: Path, weights: Path, folder: Path, *more: str) -> dict[str, Any]:
    """Run the command; return analysis.json."""
    arguments = [str(source), "--plots", str(folder), "--backbone-weights", str(weights), *more]
    assert main(arguments) == 0
    found: dict[str, Any] = json.loads((folder / "analysis.json").read_text("utf-8"))
    return found


def pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.info["dpi"] == pytest.approx((DPI, DPI), abs=0.1)
        return np.asarray(image.convert("RGB"))


def has(picture: np.ndarray[Any, np.dtype[np.uint8]], *kinds: str) -> list[bool]:
    """For each kind of matrix, whether more than 100 pixels have its colour."""
    colours = [[int(COLOURS[kind][i : i + 2], 16) for i in (1, 3, 5)] for kind in kinds]
    return [bool((picture == colour).all(-1).sum() > 100) for colour in colours]


def test_the_three_plots_of_a_run_have_the_expected_sizes_and_colours(
    run: Path, backbone_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plots(run, backbone_weights, tmp_path / "new" / "plots")
    out = capsys.readouterr().out
    sizes = {
        "angles.png": (8, 1 + 4 * 1.45),
        "spectral_norms.png": (7, 5.4),
        "orthogonality.png": (7, 5.8),
    }
    assert {path.name for path in (tmp_path / "new" / "plots").iterdir()} == {
        *sizes,
        "analysis.json",
    }
    for name, (width, height) in sizes.items():
        picture = pixels(tmp_path / "new" / "plots" / name)
        assert picture.shape == (round(height * DPI), round(width * DPI), 3)
        assert 0.01 < (picture < 250).any(-1).mean() < 0.5
        edge = np.concatenate([picture[:3].ravel(), picture[-3:].ravel(), picture[:, -3:].ravel()])
        assert (edge == 255).all(), "the plot is cut off"
        shown = has(picture, "weight", "change", "down", "up", "prompts")
        norms = name == "spectral_norms.png"
        assert shown == [name != "orthogonality.png", norms, True, True, False]
    assert f"wrote {', '.join(sizes)}, analysis.json into {tmp_path / 'new' / 'plots'}" in out
    assert "note:" not in out


def test_the_analysis_equals_a_dense_recomputation(
    run: Path, backbone_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    analysis = plots(run, backbone_weights, tmp_path)
    trained, base = load_file(run / "model.ckpt"), load_file(backbone_weights)
    ratios, deviations = [], []
    for layer in analysis["layers"]:
        if "change" not in layer["spectral_norms"]:
            continue
        q_down, q_up, scale = (
            trained[f"update.{layer['name']}.{part}"].double()
            for part in ("q_down", "q_up", "rank_scale")
        )
        down, up = approximately_orthogonal(q_down, 6), approximately_orthogonal(q_up, 6)
        change = up @ scale.diag() @ down.mT
        if layer["role"] in "qkv":
            third = "qkv".index(layer["role"])
            weight = base["blocks.0.attn.qkv.weight"][32 * third : 32 * third + 32].double()
        else:
            weight = base[f"{layer['name']}.weight"].double()
        expected = {"weight": weight, "change": change, "down": down, "up": up}
        norms = {kind: float(torch.linalg.matrix_norm(m, 2)) for kind, m in expected.items()}
        assert layer["spectral_norms"] == pytest.approx(norms)
        ratios.append(norms["change"] / norms["weight"])
        for kind, matrix in (("down", down), ("up", up)):
            gram = matrix.mT @ matrix - torch.eye(6, dtype=torch.float64)
            assert layer["deviations"][kind] == pytest.approx(float(gram.abs().max()))
            deviations.append(layer["deviations"][kind])
    assert len(ratios) == 3
    assert max(line["deviation_up_max"] for line in analysis["history"]) in deviations
    table = capsys.readouterr().out.splitlines()
    (line,) = [line for line in table if line.startswith("  ΔW / W")]
    least, middle, largest = (float(figure) for figure in line.split()[3:])
    assert [least, middle, largest] == pytest.approx(sorted(ratios), rel=1e-2)


def test_without_metrics_all_but_the_history_is_plotted(
    run: Path, backbone_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.ckpt").write_bytes((run / "model.ckpt").read_bytes())
    analysis = plots(tmp_path / "model.ckpt", backbone_weights, tmp_path / "plots")
    assert analysis["history"] == []
    assert "note: There is no " in capsys.readouterr().out
    assert pixels(tmp_path / "plots" / "orthogonality.png").shape == (round(3.6 * DPI), 7 * DPI, 3)


@pytest.mark.parametrize(
    ("method", "names", "kinds"),
    [
        ("aoft-vpt", {"angles", "spectral_norms", "orthogonality"}, {"prompts"}),
        ("aoft-adapter", {"angles", "spectral_norms", "orthogonality"}, {"down", "up", "change"}),
        ("rlrr", {"angles", "spectral_norms"}, {"change"}),
        ("bitfit", {"angles", "spectral_norms"}, {"change"}),
        ("full", {"angles", "spectral_norms"}, {"change"}),
    ],
)
def test_the_plots_of_a_method_show_its_matrices(
    method: str,
    names: set[str],
    kinds: set[str],
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    tmp_path: Path,
) -> None:
    plots(make_checkpoint(method), backbone_weights, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    shown = has(pixels(tmp_path / "spectral_norms.png"), "change", "down", "up", "prompts")
    assert shown == [kind in kinds for kind in ("change", "down", "up", "prompts")]


def test_a_new_analysis_replaces_all_files_of_an_earlier_one(
    run: Path,
    checkpoint: Path,
    backbone_weights: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    (tmp_path / "mine.txt").write_text("stays")
    plots(run, backbone_weights, tmp_path)
    assert (tmp_path / "orthogonality.png").exists()
    line = refused(main, checkpoint, "--plots", tmp_path)
    assert "angles.png exists: give another --plots, or replace it with --overwrite." in line
    assert plots(checkpoint, backbone_weights, tmp_path, "--overwrite")["method"] == "rlrr"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"mine.txt", "angles.png", "spectral_norms.png", "analysis.json"}


def test_plots_with_json_prints_the_analysis(
    run: Path, backbone_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    analysis = plots(run, backbone_weights, tmp_path, "--json")
    assert json.loads(capsys.readouterr().out) == analysis


def test_plotting_changes_no_global_state_of_matplotlib(
    run: Path, backbone_weights: Path, tmp_path: Path
) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    plots(run, backbone_weights, tmp_path, "--overwrite")
    assert (dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules) == before


def test_only_plots_need_matplotlib_or_torch(checkpoint: Path) -> None:
    code = (
        "import sys; from aoft_deploy.cli.inspect import main; main(sys.argv[1:])\n"
        "print({'matplotlib', 'torch'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_error_without_matplotlib_names_the_extra(
    run: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    line = refused(main, run, "--plots", tmp_path / "plots")
    assert line == "matplotlib is not installed: run pip install 'aoft-deploy[plots]'."


def test_a_file_that_cannot_be_analysed_is_refused(
    run: Path,
    artefact: Path,
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    folder = tmp_path / "plots"
    given = ["--plots", folder, "--backbone-weights", backbone_weights]
    line = refused(main, make_checkpoint("linear"), *given)
    assert "linear, which changes only the classifier: there is nothing to analyse" in line
    assert "give them with --backbone-weights" in refused(main, run, "--plots", folder)
    assert "is an ONNX model: give the checkpoint" in refused(main, artefact, *given)
    assert "There is no file" in refused(main, tmp_path / "missing", *given)
    assert "is an empty folder" in refused(main, tmp_path, *given)


def test_other_backbone_weights_need_force(
    run: Path, backbone_weights: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    state = {name: 2 * tensor for name, tensor in load_file(backbone_weights).items()}
    save_file(state, tmp_path / "other.safetensors")
    given = run, tmp_path / "other.safetensors", tmp_path / "plots"
    line = refused(main, run, "--plots", given[2], "--backbone-weights", given[1])
    assert "accept the difference with --force" in line
    doubled = plots(*given, "--force", "--backbone", "aoft_vit_nano")
    first = plots(run, backbone_weights, tmp_path / "first")
    for layer, other in zip(first["layers"], doubled["layers"], strict=True):
        weight = layer["spectral_norms"]["weight"]
        assert other["spectral_norms"]["weight"] == pytest.approx(2 * weight)


def test_a_folder_that_cannot_be_written_is_refused(
    run: Path, backbone_weights: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "plots" / "angles.png").mkdir(parents=True)
    given = [run, "--backbone-weights", backbone_weights, "--plots"]
    assert "Cannot write into" in refused(main, *given, tmp_path / "file")
    assert "it exists and is no file" in refused(main, *given, tmp_path / "plots")
