"""TensorRT engines: built without a GPU, verified by their graphs, refused on other machines."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from specs import export_spec
from tensorrt_target import CAPABILITY, DEVICE_NAME, GPU, on_gpu, why_no_engine_runs
from torch import nn

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.registry import get_exporter, load_artefact
from aoft_deploy.cli.export import main
from aoft_deploy.cli.inspect import describe
from aoft_deploy.cli.predict import main as predict
from aoft_deploy.errors import (
    ArtefactError,
    OutputError,
    SettingError,
    VerificationError,
)
from aoft_deploy.export.verifying import batch_pieces
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.onnx import exporter as onnx_exporter
from aoft_exporters.tensorrt import exporter
from aoft_exporters.tensorrt import library as libraries
from aoft_exporters.tensorrt.build import build
from aoft_exporters.tensorrt.engine import checked
from aoft_exporters.tensorrt.library import Gpu, library, target
from aoft_exporters.tensorrt.metadata import MARKER, METADATA, Metadata, Sample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMED = ["--compute-capability", CAPABILITY] if CAPABILITY else []
without_gpu = pytest.mark.skipif(GPU is not None, reason="needs a machine without a GPU")


def inputs(batch: int) -> NDArray[np.float32]:
    return np.random.default_rng(batch).normal(0, 1, (batch, 3, 16, 16)).astype(np.float32)


def logits_of(model: nn.Module, x: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.from_numpy(x)).numpy()
    return logits


def texts(*options: object) -> list[str]:
    return [str(option) for option in options]


@pytest.fixture(scope="module")
def options(checkpoint: Path, backbone_weights: Path) -> list[str]:
    merged = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "tensorrt"]
    return [*texts(*merged), *NAMED]


@pytest.fixture(scope="module")
def images_of(photos: list[Path], training_images: Path) -> Callable[[str], list[str]]:
    """Function from a precision to the options with the images that it needs."""

    def images(precision: str) -> list[str]:
        calibration = ["--calibrate", training_images] if precision == "fp8" else []
        return texts("--images", *photos, *calibration)

    return images


@pytest.fixture(scope="module")
def folder(options: list[str], tmp_path_factory: Any) -> Path:
    """A task exported by the command, in fp32."""
    path: Path = tmp_path_factory.mktemp("tensorrt") / "task.tensorrt"
    assert main([*options, "-o", str(path)]) == 0
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the artefact with its manifest."""
    shutil.copytree(folder, tmp_path / folder.name)
    shutil.copy(folder.with_name(f"{folder.name}.json"), tmp_path)
    return tmp_path / folder.name


@pytest.fixture(scope="module")
def fleet_tasks(make_checkpoint: Callable[..., Path], tmp_path_factory: Any) -> list[Path]:
    parent = tmp_path_factory.mktemp("tasks")
    for seed, name in enumerate(("cats", "dogs")):
        path = make_checkpoint("aoft-lora-star", rank=4 if seed < 5 else 8)
        (parent / f"{name}.ckpt").write_bytes(path.read_bytes())
    return sorted(parent.iterdir())


def check_built(path: Path, precision: str, batches: list[int]) -> None:
    """Check that the folder holds only the plan and its metadata, and that they agree."""
    assert sorted(entry.name for entry in path.iterdir()) == [METADATA, MARKER]
    metadata = Metadata.read(path / METADATA)
    plan = (path / MARKER).read_bytes()
    assert metadata.sha256 == hashlib.sha256(plan).hexdigest()
    assert list(metadata.batches) == batches
    assert metadata.info["precision"] == precision
    assert (metadata.library, metadata.version) == (library().name, library().version)
    manifest = json.loads(path.with_name(f"{path.name}.json").read_text("utf-8"))
    assert manifest["precision"] == precision
    assert manifest["verification"]["verified_on_device"] == (DEVICE_NAME or False)
    assert manifest["versions"][metadata.library] == metadata.version


@pytest.mark.parametrize("precision", exporter.EXPORTER.precisions)
def test_a_merged_model_builds_in_every_precision(
    precision: str,
    options: list[str],
    images_of: Callable[[str], list[str]],
    tmp_path: Path,
) -> None:
    path = tmp_path / "task"
    other_options = ["--precision", precision, "--min-agreement", "0.7", "-o", str(path)]
    batches = ["--batches", "1", "8", "32"]
    assert main([*options, *other_options, *images_of(precision), *batches]) == 0
    check_built(path, precision, [1, 8, 32])


@pytest.mark.parametrize("precision", exporter.EXPORTER.precisions)
def test_a_fleet_builds_in_every_precision(
    precision: str,
    fleet_tasks: list[Path],
    backbone_weights: Path,
    images_of: Callable[[str], list[str]],
    tmp_path: Path,
) -> None:
    path = tmp_path / "fleet.tensorrt"
    options: list[Any] = ["--fleet", *fleet_tasks, "--backbone-weights", backbone_weights]
    options += ["--to", "tensorrt", "--precision", precision, *images_of(precision)]
    options += ["--min-agreement", 0.7, "-o", path, *NAMED]
    assert main(texts(*options)) == 0
    check_built(path, precision, [1, 8, 32])
    metadata = Metadata.read(path / METADATA)
    assert metadata.inputs["task"] == ("int64", ())
    assert metadata.sample.tasks == 2
    assert checked(metadata, inputs(2), np.array([1, 0]))["task"].tolist() == [1, 0]
    for task in (None, np.array([0]), np.array([0, 2])):
        with pytest.raises(SettingError, match=r"needs a task|give one from 0 to 1 for each"):
            checked(metadata, inputs(2), task)


@pytest.mark.slow
def test_a_model_of_twelve_blocks_builds(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=3).eval()
    spec = export_spec(224, False, MEAN, STD, {}, "fp16", compute_capability=CAPABILITY)
    exporter.export(model, tmp_path / "a", spec)
    x = np.random.default_rng(0).normal(size=(2, 3, 224, 224)).astype(np.float32)
    np.testing.assert_allclose(
        exporter.load_intermediate(tmp_path / "a").run(x), logits_of(model, x), atol=5e-3
    )
    assert 1e7 < (tmp_path / "a" / MARKER).stat().st_size < 4e7


@without_gpu
@pytest.mark.parametrize("precision", exporter.EXPORTER.precisions)
def test_without_a_gpu_verification_emulates_the_precision(
    precision: str,
    options: list[str],
    images_of: Callable[[str], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other_options = ["--precision", precision, "-o", str(tmp_path / "task")]
    agreement = ["--min-agreement", "0.7"]
    assert main([*options, *other_options, *images_of(precision), *agreement]) == 0
    rounded = "every factor of a product" if precision == "tf32" else "every result"
    emulation = f"{precision} emulated in float32, {rounded} rounded, by onnxruntime on CPU"
    arithmetic = "fp32 by onnxruntime on CPU" if precision == "fp32" else emulation
    manifest = json.loads((tmp_path / "task.json").read_text("utf-8"))
    assert manifest["verification"]["arithmetic"] == arithmetic
    assert f"so the figures are those of {arithmetic}; the engine" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--refittable", "--refit"])
def test_an_engine_in_fp8_is_not_refitted(
    option: str,
    options: list[str],
    images_of: Callable[[str], list[str]],
    folder: Path,
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    words = [option, folder] if option == "--refit" else [option]
    words += ["--precision", "fp8", *images_of("fp8"), "-o", tmp_path / "task"]
    assert "scales of fp8 are learned anew for each task" in refused(main, *options, *words)


@without_gpu
def test_without_a_gpu_command_and_manifest_report_it(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "task"
    assert main([*options, "-o", str(path), "--batches", "2", "2", "4"]) == 0
    printed = capsys.readouterr().out
    assert "verified on 7 images at batch sizes 1, 2, 7: max |Δlogit|" in printed
    assert "NOT VERIFIED ON DEVICE: this machine has no GPU" in printed
    manifest = json.loads(path.with_name("task.json").read_text("utf-8"))
    assert manifest["verification"]["verified_on_device"] is False
    assert manifest["verification"]["max_abs"] < 1e-4
    check_built(path, "fp32", [2, 2, 4])


def test_the_intermediate_graph_gives_the_unmerged_logits(
    make_tuned: Callable[..., TunedModel], tmp_path: Path
) -> None:
    tuned = make_tuned("rlrr")
    spec = export_spec(16, False, MEAN, STD, {"a": "b"}, "bf16", compute_capability=CAPABILITY)
    exporter.export(merge(tuned), tmp_path / "a", spec)
    expected, logits = (
        logits_of(tuned, inputs(7)),
        exporter.load_intermediate(tmp_path / "a").run(inputs(7)),
    )
    assert 1e-4 < np.abs(logits - expected).max() < 0.05 * np.ptp(expected)
    sample = Metadata.read(tmp_path / "a" / METADATA).sample
    assert sample.difference(exporter.load_intermediate(tmp_path / "a"), (1, 8, 32)) == 0
    assert exporter.device(tmp_path / "a") == DEVICE_NAME


def test_the_sample_detects_another_models_engine(
    make_tuned: Callable[..., TunedModel], folder: Path, tmp_path: Path
) -> None:
    sample = Metadata.read(folder / METADATA).sample
    for seed, fits in ((2, True), (3, False)):
        path = tmp_path / f"{seed}.onnx"
        spec = export_spec(16, False, MEAN, STD, {})
        onnx_exporter.export(merge(make_tuned("rlrr", seed=seed)), path, spec)
        engine = onnx_exporter.load(path)
        assert (sample.difference(engine, (1, 8, 32)) <= sample.allowed) is fits
        assert (sample.difference(engine, (3, 3, 3)) <= sample.allowed) is fits
        assert (sample.difference(engine, (6, 7, 8)) <= sample.allowed) is fits
    assert sample.allowed < 1e-3


def test_a_fleets_sample_keeps_infinite_logits() -> None:
    inf = float("inf")
    answers = np.array([[1.0, -inf], [0.5, 2.0]], np.float32)
    sample = Sample(16, False, 2).answered(answers, answers, 1e-4)
    assert sample.logits == [[1.0, None], [0.5, 2.0]]
    assert sample.allowed == pytest.approx(2e-4)
    with pytest.raises(VerificationError, match="are not finite in this precision"):
        sample.answered(answers * inf, answers, 1e-4)


def test_the_pixel_graph_builds(options: list[str], tmp_path: Path) -> None:
    assert main([*options, "-o", str(tmp_path / "a"), "--uint8"]) == 0
    metadata = Metadata.read(tmp_path / "a" / METADATA)
    assert metadata.inputs == {"image": ("uint8", (16, 16, 3))}
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    assert checked(metadata, pixels, None)["image"].dtype == np.uint8


def test_batches_outside_the_profile_and_invalid_inputs_are_refused(folder: Path) -> None:
    metadata = Metadata.read(folder / METADATA)
    assert list(checked(metadata, inputs(32), None)) == ["pixel_values"]
    for size in (33, 100):
        with pytest.raises(
            SettingError, match=rf"batches of up to 32 images, but got {size}: split"
        ):
            checked(metadata, inputs(size), None)
    with pytest.raises(SettingError, match=r"takes float32 \[batch, 3, 16, 16\], but got float64"):
        checked(metadata, inputs(1).astype(np.float64), None)
    with pytest.raises(SettingError, match="This artefact holds a single task"):
        checked(metadata, inputs(1), np.array([0]))


def test_a_batch_is_split_and_padded_to_the_artefacts_range() -> None:
    pieces = [(indices.tolist(), count) for indices, count in batch_pieces(5, (2, 2, 4))]
    assert pieces == [([0, 1, 2, 3], 4), ([4, 4], 1)]
    assert [count for _, count in batch_pieces(33, (1, 8, 32))] == [32, 1]


@pytest.mark.parametrize("file", [MARKER, METADATA])
def test_a_changed_artefact_is_not_run(file: str, copy: Path) -> None:
    data = bytearray((copy / file).read_bytes())
    index = len(data) // 2 if file == MARKER else data.index(b'"rlrr"') + 1
    data[index] ^= 1
    (copy / file).write_bytes(data)
    with pytest.raises(ArtefactError, match=r"was changed after (it|its manifest)"):
        exporter.load(copy)
    if file == MARKER:  # the plan's own hash needs no manifest
        copy.with_name(f"{copy.name}.json").unlink()
        with pytest.raises(ArtefactError, match=r"is not the plan that engine\.json names"):
            load_artefact(copy)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.999, -1])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_truncated_plan_is_not_run(manifest: bool, kept: float, copy: Path) -> None:
    plan = (copy / MARKER).read_bytes()
    end = kept if isinstance(kept, int) else int(kept * len(plan))
    (copy / MARKER).write_bytes(plan[:end])
    if not manifest:
        copy.with_name(f"{copy.name}.json").unlink()
    with pytest.raises(ArtefactError, match=r"is not the plan that engine\.json names"):
        exporter.load(copy)
    with pytest.raises(ArtefactError, match=r"was changed after|is not the plan that engine"):
        load_artefact(copy)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}', None])
def test_missing_or_foreign_metadata_are_refused(text: str | None, copy: Path) -> None:
    (copy / METADATA).unlink()
    if text is not None:
        (copy / METADATA).write_text(text)
    with pytest.raises(ArtefactError, match="does not describe the plan beside it") as error:
        exporter.load(copy)
    assert len(str(error.value).splitlines()) == 1


def test_a_foreign_manifest_is_refused(copy: Path) -> None:
    copy.with_name(f"{copy.name}.json").write_text("[]")
    with pytest.raises(ArtefactError, match="is no manifest of aoft-export"):
        exporter.load(copy)


def test_engines_of_another_version_or_gpu_are_refused(folder: Path) -> None:
    metadata = Metadata.read(folder / METADATA)
    metadata.check_here(folder, metadata.version, metadata.capability)
    with pytest.raises(ArtefactError, match=r"was built with .* but 99\.1 is installed"):
        metadata.check_here(folder, "99.1", metadata.capability)
    with pytest.raises(ArtefactError, match=r"for GPUs of compute capability .* has 5\.0: export"):
        metadata.check_here(folder, metadata.version, "5.0")


def test_aoft_inspect_describes_an_engine(folder: Path, copy: Path) -> None:
    found = describe(folder)
    assert (found["kind"], found["precision"], found["method"]) == (
        "TensorRT artefact",
        "fp32",
        "rlrr",
    )
    assert (found["batches"], found["origin"], found["manifest"]) == (
        [1, 8, 32],
        "built",
        "matches",
    )
    assert found["bytes"] > (folder / MARKER).stat().st_size
    for text in ("[]", "{}", None):
        (copy / METADATA).write_text(text) if text else (copy / MARKER).unlink()
        with pytest.raises(
            ArtefactError, match=r"does not describe the plan|engine\.json|There is no model\.plan"
        ):
            describe(copy)


@without_gpu
def test_running_without_a_gpu_is_refused(
    folder: Path, photos: list[Path], refused: Callable[..., str]
) -> None:
    line = refused(predict, folder, photos[0])
    assert "needs an NVIDIA GPU of compute capability 8.9, and this machine has none" in line
    with pytest.raises(SettingError, match="has none called cpu: run it there, or export to"):
        exporter.load(folder, EngineOptions(device="cpu"))
    with pytest.raises(SettingError, match="has no threads to choose"):
        exporter.load(folder, EngineOptions(threads=2))


def test_a_missing_artefact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"There is no folder .* with a model\.plan"):
        exporter.load(tmp_path)


def test_invalid_options_are_refused_in_one_line_and_leave_no_file(
    options: list[str],
    fleet_tasks: list[Path],
    photos: list[Path],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    output = ["-o", tmp_path / "a"]
    merge_only = [option for option in options if option not in NAMED]
    for batches in ((8, 4, 32), (0, 1, 2), (1, 9, 8), (-1, 1, 1)):
        line = refused(main, *options, *output, "--batches", *batches)
        assert "must be the smallest, usual and largest batch" in line
    line = refused(main, *options, *output, "--precision", "int8", "--images", *photos)
    assert "Unknown precision of tensorrt 'int8'. Known: bf16, fp16, fp32, fp8, tf32." in line
    onnx_options = [*merge_only[:-1], "onnx", "-o", tmp_path / "a.onnx"]
    assert "onnx takes batches of any size" in refused(main, *onnx_options, "--batches", 1, 2, 3)
    assert "builds for no GPU" in refused(main, *onnx_options, "--compute-capability", "8.9")
    fleet = ["--fleet", *fleet_tasks, *merge_only[2:4], *output]
    line = refused(main, *fleet, "--to", "tensorrt", "--form", "folded")
    assert "does not support fleets of the form folded" in line
    assert "timm writes no fleets: choose onnx or " in refused(main, *fleet, "--to", "timm")
    if GPU is None:
        assert "name the one to build for with --compute-capability, one of 7.5" in refused(
            main, *merge_only, *output
        )
        line = refused(main, *merge_only, *output, "--compute-capability", "9.9")
        assert "does not build for compute capability 9.9, but for 7.5" in line


def test_a_difference_above_the_tolerance_leaves_no_file(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = replace(exporter.EXPORTER, tolerance=1e-12)
    monkeypatch.setattr("aoft_deploy.export.merged.get_exporter", lambda name: strict)
    assert main([*options, "-o", str(tmp_path / "a")]) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_only_tf32_lets_tensorrt_compute_float32_in_tf32(
    precision: str,
    make_tuned: Callable[..., TunedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trt, flags = libraries.target(CAPABILITY).library.module, list[bool]()

    class Builder:
        def __init__(self, log: Any) -> None:
            self._builder = real(log)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._builder, name)

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            flags.append(config.get_flag(trt.BuilderFlag.TF32))
            return self._builder.build_serialized_network(network, config)

    real = trt.Builder
    monkeypatch.setattr(trt, "Builder", Builder)
    spec = export_spec(16, False, MEAN, STD, {}, precision, compute_capability=CAPABILITY)
    exporter.export(merge(make_tuned("rlrr")), tmp_path / "a", spec)
    assert flags == [precision == "tf32"]


def test_the_sample_of_a_tf32_engine_has_the_rounding_of_tf32(
    make_tuned: Callable[..., TunedModel], tmp_path: Path
) -> None:
    samples = {}
    for precision in ("fp32", "tf32"):
        path = tmp_path / precision
        spec = export_spec(16, False, MEAN, STD, {}, precision, compute_capability=CAPABILITY)
        exporter.export(merge(make_tuned("rlrr")), path, spec)
        samples[precision] = Metadata.read(path / METADATA).sample
    logits = [np.array(sample.logits) for sample in samples.values()]
    rounding = np.abs(logits[0] - logits[1]).max()
    assert 1e-6 < rounding < 1e-2 * np.abs(logits[0]).max()
    assert samples["tf32"].allowed == pytest.approx(samples["fp32"].allowed + 4 * rounding)


def test_a_graph_that_tensorrt_cannot_read_is_refused(tmp_path: Path) -> None:
    chosen = target(CAPABILITY)
    with pytest.raises(OutputError, match=r"TensorRT cannot read the graph \(.+\)"):
        build(b"nonsense", chosen, (1, 2, 3))
    info, make = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [make("Det", ["x"], ["logits"])],
        "g",
        [info("x", 1, ["batch", 2, 2])],
        [info("logits", 1, ["batch"])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    with pytest.raises(OutputError, match="TensorRT cannot"):
        build(model.SerializeToString(), chosen, (1, 2, 3))


@without_gpu
def test_a_missing_package_is_named_with_its_extra(options: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['tensorrt_rtx'] = None\n"
        "from aoft_deploy.cli.export import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *options, "-o", str(tmp_path / "a")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    extra = "pip install 'aoft-deploy[gpu]'"
    assert result.stderr == f"error: tensorrt-rtx is not installed: run {extra}.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"])
def test_tests_on_a_gpu_run_where_tensorrt_rtx_builds_for_it(
    capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "find_gpu", lambda index=0: Gpu("GPU", capability))
    assert why_no_engine_runs() is None


@pytest.mark.skipif(GPU is not None, reason="TensorRT may be installed beside a GPU")
@pytest.mark.parametrize(("name", "capability"), [("H100", "9.0"), ("B200", "10.0")])
def test_tests_on_a_gpu_that_tensorrt_rtx_refuses_are_skipped_with_its_reason(
    name: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "find_gpu", lambda index=0: Gpu(name, capability))
    reason = why_no_engine_runs() or ""
    assert f"does not build for this machine's {name} of compute capability {capability}" in reason
    assert "but for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1: install NVIDIA's tensorrt, or" in reason


def test_the_exporter_is_found_by_name() -> None:
    found: object = get_exporter("tensorrt")
    assert found is exporter.EXPORTER


class TestOnDevice:
    """Tests that need a GPU."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("batch", [1, 2, 7, 32])
    def test_the_engine_gives_the_unmerged_logits(
        self, batch: int, folder: Path, make_tuned: Callable[..., TunedModel]
    ) -> None:
        engine = exporter.load(folder, EngineOptions(lanes=2))
        expected = logits_of(make_tuned("rlrr"), inputs(batch))
        for _ in range(4):  # twice in each lane
            np.testing.assert_allclose(engine.run(inputs(batch)), expected, atol=1e-4, rtol=0)
        assert engine.device == "cuda:0"
        assert 0 < engine.device_seconds(inputs(batch)) < 60

    @pytest.mark.parametrize("lanes", [1, 2, 4])
    def test_sixteen_threads_get_the_unmerged_logits_of_their_batches(
        self, lanes: int, folder: Path, make_tuned: Callable[..., TunedModel]
    ) -> None:
        from concurrent.futures import ThreadPoolExecutor

        engine = exporter.load(folder, EngineOptions(lanes=lanes))
        batches = [inputs(1 + i % 32) for i in range(256)]
        expected = [logits_of(make_tuned("rlrr"), batch) for batch in batches[:32]]
        with ThreadPoolExecutor(16) as pool:
            for i, logits in enumerate(pool.map(engine.run, batches)):
                np.testing.assert_allclose(logits, expected[i % 32], atol=1e-4, rtol=0)

    def test_engines_load_while_another_one_runs(self, folder: Path) -> None:
        from concurrent.futures import ThreadPoolExecutor

        engine = exporter.load(folder, EngineOptions(lanes=2))
        expected = engine.run(inputs(7))
        with ThreadPoolExecutor(4) as pool:
            loads = [pool.submit(exporter.load, folder) for _ in range(2)]
            while not all(load.done() for load in loads):
                np.testing.assert_allclose(engine.run(inputs(7)), expected, atol=1e-5, rtol=0)
        for load in loads:
            np.testing.assert_allclose(load.result().run(inputs(7)), expected, atol=1e-5, rtol=0)

    def test_an_engine_with_other_logits_is_not_used(self, copy: Path) -> None:
        metadata = json.loads((copy / METADATA).read_text("utf-8"))
        metadata["sample"]["logits"][0][0] += 1
        (copy / METADATA).write_text(json.dumps(metadata))
        copy.with_name(f"{copy.name}.json").unlink()
        with pytest.raises(VerificationError, match=r"differ from its graph's by .* not used"):
            exporter.load(copy)
