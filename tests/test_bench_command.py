from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from aoft_deploy.cli.bench import main


def test_artefacts_are_timed_beside_each_other(
    artefact: Path, pixel_artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "speed.png"
    options = ["--batches", "1", "3", "--rounds", "3", "--json", str(figures)]
    assert main([str(artefact), str(pixel_artefact), *options, "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(figures.read_text("utf-8"))
    assert [(row["batch"], row["name"]) for row in found["rows"]] == [
        (batch, path.name if path.name != artefact.name else row["name"])
        for row, (batch, path) in zip(
            found["rows"],
            [(b, p) for b in (1, 3) for p in (artefact, pixel_artefact)],
            strict=True,
        )
    ]
    for row in found["rows"]:
        assert len(row["rounds"]) == 3
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["ratio_lowest"] <= row["ratio"] <= row["ratio_highest"]
        assert 0 < row["share_of_peak"] < 1
        assert f"{row['images_per_second']:.2f}" in out
    assert [row["ratio"] for row in found["rows"]][::2] == [1, 1]
    assert found["gemm_peaks"]["fp32"] > 1e9
    assert found["machine"]["processor"]
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) > 200


def test_every_engine_and_number_of_threads_gets_a_line(
    artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = ["--engines", "onnxruntime", "openvino", "--threads", "1", "2"]
    assert main([str(artefact), *engines, "--batches", "2", "--rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:-1]
    labels = [f"{artefact.name} {e} ×{n}" for e in ("onnxruntime", "openvino") for n in (1, 2)]
    assert [label in line for label, line in zip(labels, lines, strict=True)] == [True] * 4


def test_a_fleet_is_timed_with_its_tasks_in_turn(
    fleet_artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(fleet_artefact), "--rounds", "2"]) == 0
    assert capsys.readouterr().out.count(fleet_artefact.name) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engines", "tensorrt"], "Unknown engine for .* 'tensorrt'. Known: onnxruntime"),
        (["--device", "cuda"], "onnxruntime-gpu is not installed"),
        (["--device", "tpu"], "no device 'tpu': give cpu, cuda or tensorrt"),
        (["--json", "/nowhere/figures.json"], "The figures cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    artefact: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(artefact), *options, "--rounds", "1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)


def test_artefacts_of_different_sizes_are_refused(
    artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    model = onnx.load(artefact)
    props = {entry.key: entry.value for entry in model.metadata_props}
    props["preprocessing"] = json.dumps({**json.loads(props["preprocessing"]), "size": 32})
    onnx.helper.set_model_props(model, props)
    onnx.save(model, tmp_path / "other.onnx")
    assert main([str(artefact), str(tmp_path / "other.onnx")]) == 1
    assert "different input sizes" in capsys.readouterr().err
    del props["preprocessing"]
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, props)
    onnx.save(model, tmp_path / "other.onnx")
    assert main([str(tmp_path / "other.onnx")]) == 1
    assert "names no preprocessing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [[], ["a.onnx", "--rounds", "0"], ["a.onnx", "--batches", "-1"]]
)
def test_wrong_usage_exits_with_2(options: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(options)
    assert exit.value.code == 2


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom aoft_deploy.cli.bench import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as exit:\n    assert exit.code == 0\n"
        "assert not {'torch', 'onnxruntime', 'timm', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
