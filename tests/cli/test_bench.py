from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import standin_gpu_engine
from faulty_model import metadata_of
from PIL import Image
from tensorrt_target import CAPABILITY, GPU

from aoft_deploy.artefacts import timing
from aoft_deploy.cli.bench import main
from aoft_deploy.cli.export import main as export_main


def test_two_artefacts_are_timed_in_one_run(
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
        assert row["share_of_peak"] is None or 0 < row["share_of_peak"] <= 1
        assert f"{row['images_per_second']:.2f}" in out
    assert [row["ratio"] for row in found["rows"]][::2] == [1, 1]
    assert found["gemm_peaks"]["cpu"]["fp32"] > 0
    assert found["machine"]["processor"] and found["placements"] == []
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) > 200


def without_torch(*arguments: object) -> int:
    """Run the command where PyTorch is not installed, so that it measures no peaks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        return main([str(argument) for argument in arguments])


def test_every_engine_and_number_of_threads_gets_a_line(
    artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = ["--engines", "onnxruntime", "openvino", "--threads", "1", "2"]
    assert without_torch(artefact, *engines, "--batches", "2", "--rounds", "2") == 0
    lines = capsys.readouterr().out.splitlines()[1:-1]
    labels = [f"{artefact.name} {e} ×{n}" for e in ("onnxruntime", "openvino") for n in (1, 2)]
    assert [label in line for label, line in zip(labels, lines, strict=True)] == [True] * 4


@pytest.fixture
def plan(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the exporter tensorrt that runs on a GPU which does not exist."""
    monkeypatch.setattr("aoft_deploy.artefacts.registry.load_artefact", standin_gpu_engine.load)
    return standin_gpu_engine.write(tmp_path / "task.tensorrt", metadata_of(artefact))


def test_an_artefact_on_a_gpu_gets_no_threads_and_its_gpus_own_time_is_shown(
    plan: Path, artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    options = ["--threads", "1", "2", "--batches", "2", "--rounds", "2", "--json", figures]
    assert without_torch(artefact, plan, *options) == 0
    out, err = capsys.readouterr()
    assert err == ""
    header, *rows, _, _ = out.splitlines()
    assert header.split() == ["batch", "artefact", "ms", "GPU", "ms", "img/s", "ratio"]
    assert [row.split()[1:-4] for row in rows] == [
        [artefact.name, "×1"],
        [artefact.name, "×2"],
        [plan.name],
    ]
    assert [row.split()[-3] for row in rows] == ["-", "-", "12.50"]
    assert [len(row) for row in rows] == [len(header)] * 3
    found = json.loads(figures.read_text("utf-8"))["rows"]
    assert [(row["device"], row["device_seconds"]) for row in found] == [
        ("cpu", None),
        ("cpu", None),
        ("cuda:0", standin_gpu_engine.DEVICE_SECONDS),
    ]


def test_each_artefact_is_timed_with_each_number_of_lanes(
    plan: Path, artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    options = ["--lanes", "1", "3", "--batches", "1", "--rounds", "1", "--json", figures]
    assert without_torch(plan, artefact, *options) == 0
    rows = json.loads(figures.read_text("utf-8"))["rows"]
    assert [(row["name"], row["lanes"]) for row in rows] == [
        (f"{plan.name} 1 lane", 1),
        (f"{plan.name} 3 lanes", 3),
        (f"{artefact.name} 1 lane", 1),
        (f"{artefact.name} 3 lanes", 3),
    ]


def test_the_share_refers_to_the_peak_of_the_artefacts_device(
    plan: Path,
    artefact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peaks = {"cpu": {"fp32": 1e15}, "cuda:0": {"fp32": 5e15, "fp16": 9e15}}
    module = "aoft_deploy.artefacts"
    monkeypatch.setattr(f"{module}.machine.gemm_peaks", lambda threads: peaks["cpu"])
    monkeypatch.setattr(f"{module}.gpu_peaks.gpu_gemm_peaks", lambda device: peaks[device])
    monkeypatch.setattr(f"{module}.gpu_peaks.gpu_name", lambda device: "Tesla")
    figures = tmp_path / "figures.json"
    options = [str(artefact), str(plan), "--batches", "1", "--rounds", "1"]
    assert main([*options, "--json", str(figures)]) == 0
    found = json.loads(figures.read_text("utf-8"))
    flops = int(metadata_of(artefact)["flops"])
    for row in found["rows"]:
        share = row["images_per_second"] * flops / peaks[row["device"]]["fp32"]
        assert row["share_of_peak"] == pytest.approx(share)
    assert found["gemm_peaks"] == peaks
    assert found["machine"]["gpus"] == {"cuda:0": "Tesla"}
    out = capsys.readouterr().out
    assert "peak of matrix products on cuda:0, Tesla, in 10⁹ operations per second: fp32 5" in out
    assert "no share of fp8: its products are not faster" in out


@pytest.mark.skipif(GPU is not None, reason="needs a machine without a GPU")
def test_a_plan_without_its_gpu_is_refused_for_the_gpu_and_not_for_threads(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    plan = tmp_path / "task.tensorrt"
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "-o", plan]
    named = ["--to", "tensorrt", "--compute-capability", CAPABILITY]
    assert export_main([str(option) for option in [*options, *named]]) == 0
    line = refused(main, plan)
    assert "needs an NVIDIA GPU of compute capability 8.9, and this machine has none" in line


def test_threads_without_an_artefact_on_the_cpu_are_refused(
    plan: Path, refused: Callable[..., str]
) -> None:
    line = refused(main, plan, "--threads", 2)
    assert line == "--threads is for artefacts on the CPU, but all run on a GPU."


def test_a_fleet_is_timed_with_its_tasks_in_turn(
    fleet_artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert without_torch(fleet_artefact, "--rounds", "2") == 0
    assert capsys.readouterr().out.count(fleet_artefact.name) == 2


def test_the_share_refers_to_the_peak_of_the_artefacts_precision(
    artefact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peaks = {"fp32": 1e15, "int8": 2e15}
    monkeypatch.setattr("aoft_deploy.artefacts.machine.gemm_peaks", lambda threads: peaks)
    options = [str(artefact), "--batches", "2", "--rounds", "2"]
    assert main([*options, "--json", str(tmp_path / "figures.json")]) == 0
    (row,) = json.loads((tmp_path / "figures.json").read_text("utf-8"))["rows"]
    (flops,) = (
        int(entry.value) for entry in onnx.load(artefact).metadata_props if entry.key == "flops"
    )
    assert row["share_of_peak"] == pytest.approx(row["images_per_second"] * flops / 1e15)
    out = capsys.readouterr().out
    assert "fp32 1,000,000, int8 2,000,000" in out
    assert "no share of bf16: its products are not faster than those of fp32" in out
    assert re.search(rf"^ +2 +{artefact.name} +\d+% of fp32$", out, re.M)


def test_a_share_above_100_per_cent_is_left_out(
    artefact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peaks = {"fp32": 1.0, "int8": 2.0}
    monkeypatch.setattr("aoft_deploy.artefacts.machine.gemm_peaks", lambda threads: peaks)
    options = [str(artefact), "--batches", "1", "--rounds", "2"]
    assert main([*options, "--json", str(tmp_path / "figures.json")]) == 0
    found = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert [row["share_of_peak"] for row in found["rows"]] == [None]
    assert found["gemm_peaks"] == {"cpu": peaks}
    out = capsys.readouterr().out
    assert "no share of fp32: an artefact is faster" in out
    assert "no share of int8" not in out and "%" not in out


def test_the_timings_are_printed_before_the_peaks_are_measured(
    artefact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(threads: int) -> dict[str, float]:
        assert re.search(rf"^ +1 +{artefact.name} +[\d.]+ ", capsys.readouterr().out, re.M)
        raise KeyboardInterrupt

    monkeypatch.setattr("aoft_deploy.artefacts.machine.gemm_peaks", stopped)
    assert main([str(artefact), "--batches", "1", "--rounds", "1"]) == 1


def test_each_batch_size_is_printed_before_the_next_is_timed(
    artefact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[str] = []

    def observed(*arguments: Any) -> list[timing.Timing]:
        printed.append(capsys.readouterr().out)
        return interleaved(*arguments)

    interleaved = timing.interleaved
    monkeypatch.setattr(timing, "interleaved", observed)
    assert without_torch(artefact, "--batches", "2", "3", "--rounds", "1") == 0
    assert re.search(rf"^batch .*\n +2 +{artefact.name} +[\d.]+ .*\n$", printed[1])
    assert printed[0] == ""
    row, shares = capsys.readouterr().out.splitlines()
    assert re.search(rf"^ +3 +{artefact.name} +[\d.]+ ", row)
    assert shares == "no shares of the peak: measuring it needs PyTorch, aoft-deploy[train]"


def test_an_artefact_that_fails_leaves_the_others_timed(
    artefact: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    options = ["--batches", "1", "--rounds", "1", "--json", str(figures)]
    assert without_torch(checkpoint, artefact, tmp_path / "none", *options) == 1
    first, second, error = capsys.readouterr().err.splitlines()
    assert first.endswith(f"is a checkpoint: export it first: aoft-export --merge {checkpoint}.")
    assert second == f"warning: none is left out: There is no file {tmp_path / 'none'}."
    assert error == "error: 2 of 3 timings are missing."
    assert [row["name"] for row in json.loads(figures.read_text("utf-8"))["rows"]] == [
        artefact.name
    ]
    assert main([str(checkpoint), str(tmp_path / "none"), "--batches", "1"]) == 1
    assert capsys.readouterr().err.endswith("error: Nothing was timed: see the warnings.\n")


def test_an_existing_result_is_replaced_only_on_request(
    artefact: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "speed.png"
    figures.write_text("mine")
    picture.write_text("mine")
    line = refused(main, artefact, "--json", figures)
    assert line == f"{figures} exists: give another --json, or replace it with --overwrite."
    assert "give another --plot" in refused(main, artefact, "--plot", picture)
    options = ["--batches", "1", "--rounds", "1", "--json", str(figures), "--plot", str(picture)]
    assert without_torch(artefact, *options, "--overwrite") == 0
    assert json.loads(figures.read_text("utf-8"))["rows"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engines", "tensorrt"], "Unknown engine for .* 'tensorrt'. Known: onnxruntime"),
        (["--device", "cuda"], "onnxruntime-gpu is not installed"),
        (["--device", "mps"], "Unknown device of ONNX Runtime 'mps': give cpu, cuda, or cuda:1"),
        (["--json", "/nowhere/figures.json"], "There is no folder /nowhere: give another --json"),
        (["--plot", "{pipe}"], "{pipe} exists and is no file: give another --plot"),
    ],
)
def test_an_invalid_option_is_a_one_line_error(
    artefact: Path,
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe = tmp_path / "pipe"  # a device would be lost if the check failed
    os.mkfifo(pipe)
    given = [option.format(pipe=pipe) for option in options]
    assert main([str(artefact), *given, "--rounds", "1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message.format(pipe=pipe), err)


def test_artefacts_of_different_sizes_are_refused(
    artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(artefact)
    props = metadata_of(artefact)
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
    assert "no valid entry 'preprocessing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["a.onnx", "--rounds", "0"],
        ["a.onnx", "--batches", "-1"],
        ["a.onnx", "--device", "tpu"],
    ],
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
