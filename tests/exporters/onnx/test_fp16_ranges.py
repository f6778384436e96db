"""fp16 is verified by arithmetic that overflows as on a GPU; such products stay in float32."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file
from specs import export_spec

from aoft_deploy.artefacts.registry import exporter_names, get_exporter
from aoft_deploy.artefacts.spec import BuildOptions, ExportSpec
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.cli.export import main
from aoft_deploy.data.images import read_image
from aoft_deploy.data.listing import image_files
from aoft_deploy.data.normalisation import normalised
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import VerificationError
from aoft_deploy.export.fleet import export_fleet
from aoft_deploy.export.merged import export_merged
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.graph.emulation import emulated
from aoft_exporters.graph.low_precision import LARGEST_FP16, typed
from aoft_exporters.onnx import exporter
from aoft_exporters.onnx.fp16_ranges import HEADROOM, in_range, magnitudes

FC1, FC2 = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def massive(
    backbone_weights: Path, backbone_name: str, backbone_args: dict[str, Any], tmp_path_factory: Any
) -> Callable[..., tuple[Path, Path, TunedModel]]:
    """A task whose backbone has an activation of 2 million: checkpoint, weights and model.

    Every weight is within fp16's range. Real ViTs have such channels, the "massive activations".
    """
    folder = tmp_path_factory.mktemp("massive")
    weights = load_file(backbone_weights)
    fc1 = weights[FC1]
    fc1[0] = 3e4 * torch.sign(torch.linspace(-1, 1.5, fc1.shape[1]))
    weights[FC2][:, 0] = 1e-6 * torch.linspace(-1, 1, weights[FC2].shape[0])
    path = folder / "backbone.safetensors"
    save_file(weights, path)

    def make(name: str, seed: int = 0, scale: float = 0.1) -> Any:
        model, identity = create_backbone(
            backbone_name, num_classes=5, weights=path, **backbone_args
        )
        tuned = attach(model, "aoft-lora-star", seed=seed, backbone=identity)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name_of, parameter in tuned.trained().items():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_((0.1 if name_of.startswith("head.") else scale) * noise)
        checkpoint = folder / f"{name}.ckpt"
        preprocessing = Preprocessing(16, crop_pct=0.9, mean=MEAN, std=STD)
        save(tuned, checkpoint, classes=tuple("abcde"), preprocessing=preprocessing, training={})
        return checkpoint, path, tuned.eval()

    return make


def inputs_of(photos: list[Path]) -> NDArray[np.float32]:
    preprocessing = Preprocessing(16, crop_pct=0.9, mean=MEAN, std=STD)
    pixels = [preprocessing.pixels(read_image(path)) for path in image_files(photos)]
    return normalised(np.stack(pixels), MEAN, STD)


def unmerged(tuned: TunedModel, x: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits: NDArray[np.float32] = tuned(torch.from_numpy(x)).numpy()
    return logits


def reference(proto: Any, **feed: NDArray[Any]) -> NDArray[np.float32]:
    """Logits by ONNX's numpy evaluator, which computes fp16 operators in float16."""
    evaluator: Any = ReferenceEvaluator(proto)
    with np.errstate(all="ignore"):
        logits: NDArray[np.float32] = evaluator.run(None, feed)[0]
    return logits


def nothing_left_in_float(
    proto: Any, spec: ExportSpec, tables: Any = None
) -> tuple[Any, list[str]]:
    return typed(proto, spec.precision), []


def test_the_model_overflows_in_half_precision_only(
    massive: Callable[..., Any], photos: list[Path]
) -> None:
    _, _, tuned = massive("real")
    x = inputs_of(photos)
    exact = unmerged(tuned, x)
    assert np.isfinite(exact).all()
    half = merge(tuned).half()
    with torch.inference_mode():
        assert not torch.isfinite(half(torch.from_numpy(x).half())).all()


@pytest.mark.parametrize("to", ["onnx", "triton"])
@pytest.mark.parametrize("uint8", [False, True])
def test_products_that_overflow_stay_in_float32_and_command_and_manifest_name_them(
    to: str,
    uint8: bool,
    massive: Callable[..., Any],
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, weights, tuned = massive("kept")
    path = tmp_path / ("a.onnx" if to == "onnx" else "a")
    options = ["--merge", checkpoint, "--backbone-weights", weights, "--to", to, "-o", path]
    options += ["--precision", "fp16", "--images", photos[0].parent]
    assert main([str(o) for o in [*options, *(["--uint8"] if uint8 else [])]]) == 0
    printed = capsys.readouterr().out
    assert f"left in float32: {FC1}, {FC2}\n" in printed
    assert "NOT VERIFIED ON DEVICE: no runtime on the CPU computes in fp16" in printed
    manifest = json.loads(path.with_name(f"{path.name}.json").read_text("utf-8"))
    assert manifest["left_in_float"] == [FC1, FC2]
    verification = manifest["verification"]
    assert verification["verified_on_device"] is False
    assert verification["arithmetic"] == (
        "fp16 emulated in float32, every result rounded, by onnxruntime on CPU"
    )
    file = path / "1" / "model.onnx" if to == "triton" else path
    proto = onnx.load(file)
    kinds = {i.name: i.data_type for i in proto.graph.initializer}
    assert kinds[FC1] == kinds[FC2] == TensorProto.FLOAT
    assert kinds["blocks.0.attn.qkv.weight"] == TensorProto.FLOAT16
    if uint8:
        return
    x = inputs_of(photos)
    exact, found = unmerged(tuned, x), reference(proto, pixel_values=x)
    assert np.isfinite(found).all()
    assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()
    assert (found.argmax(1) == exact.argmax(1)).all()


@pytest.mark.parametrize(
    ("to", "fleet"),
    [*itertools.product(["onnx", "triton", "tensorrt"], [False, True]), ("timm", False)],
)
def test_a_graph_that_overflows_is_refused_by_every_exporter_and_leaves_no_file(
    to: str,
    fleet: bool,
    massive: Callable[..., Any],
    photos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {n for n in exporter_names() if "fp16" in get_exporter(n).precisions} == {
        "aoti",
        "onnx",
        "tensorrt",
        "timm",
        "triton",
        "triton-tensorrt",
    }
    checkpoint, weights, _ = massive("refused")
    for module in ("onnx", "tensorrt"):
        monkeypatch.setattr(f"aoft_exporters.{module}.exporter.in_range", nothing_left_in_float)
    output = tmp_path / ("a" + get_exporter(to).suffix)
    told: dict[str, Any] = {
        "to": to,
        "backbone": BackboneSource(weights=weights),
        "precision": "fp16",
        "verify": VerifyOptions(photos),
    }
    told |= {"build": BuildOptions(compute_capability="8.9")} if to == "tensorrt" else {}
    with pytest.raises(VerificationError, match=r"finite values are expected|are not finite in"):
        if fleet:
            export_fleet([checkpoint], output, **told)
        else:
            export_merged(checkpoint, output, **told)
    assert list(tmp_path.iterdir()) == []


def test_a_fleet_keeps_in_float32_what_one_of_its_tasks_overflows(
    massive: Callable[..., Any], photos: list[Path], tmp_path: Path
) -> None:
    tasks = [massive(f"task {seed}", seed=seed) for seed in range(3)]
    path = tmp_path / "fleet.onnx"
    checkpoints = [checkpoint for checkpoint, _, _ in tasks]
    exported = export_fleet(
        checkpoints,
        path,
        precision="fp16",
        backbone=BackboneSource(weights=tasks[0][1]),
        verify=VerifyOptions(images=photos),
    )
    assert exported.left_in_float == (FC1, FC2)
    assert exported.device is None
    manifest = json.loads(exported.manifest.read_text("utf-8"))
    assert manifest["left_in_float"] == [FC1, FC2]
    assert "emulated" in manifest["verification"]["arithmetic"]
    x = inputs_of(photos)
    for index, (_, _, tuned) in enumerate(tasks):
        exact = unmerged(tuned, x)
        found = reference(onnx.load(path), pixel_values=x, task=np.full(len(x), index))
        assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


def test_a_product_that_overflows_for_one_task_of_a_fleet_stays_in_float32(
    massive: Callable[..., Any], photos: list[Path], tmp_path: Path
) -> None:
    """The last task's updates of q and v are so large that attention scores overflow."""
    tasks = [massive("calm", seed=0), massive("calm too", seed=1), massive("wild", 2, 300.0)]
    left = []
    for count in (2, 3):
        exported = export_fleet(
            [checkpoint for checkpoint, _, _ in tasks[:count]],
            tmp_path / f"{count}.onnx",
            precision="fp16",
            backbone=BackboneSource(weights=tasks[0][1]),
            verify=VerifyOptions(images=photos, min_agreement=0.5),
        )
        left.append(set(exported.left_in_float))
    assert left[0] == {FC1, FC2}
    assert any("attention_0" in name for name in left[1] - left[0])


def test_verification_reports_the_emulated_fp16_logits(
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    make_tuned: Callable[..., TunedModel],
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.onnx"
    exported = export_merged(
        checkpoint,
        path,
        precision="fp16",
        backbone=BackboneSource(weights=backbone_weights),
        verify=VerifyOptions(images=photos, min_agreement=0.5),
    )
    x = inputs_of(photos)
    exact = unmerged(make_tuned("rlrr"), x)
    found = reference(emulated(onnx.load(path)), pixel_values=x)
    assert exported.report.max_abs == pytest.approx(np.abs(found - exact).max(), rel=0.02)
    kept_in_float32 = exporter.load(path).run(x)
    assert exported.report.max_abs != pytest.approx(np.abs(kept_in_float32 - exact).max(), rel=0.02)
    assert exported.left_in_float == ()
    assert "left_in_float" not in json.loads(exported.manifest.read_text("utf-8"))


@pytest.mark.parametrize(
    ("to", "precision", "arithmetic"),
    [
        ("onnx", "fp32", "fp32 by onnxruntime on CPU"),
        ("onnx", "int8", "int8 by onnxruntime on CPU"),
        ("triton", "int8", "int8 by onnxruntime on CPU"),
        ("timm", "fp32", "fp32 by torch on CPU"),
    ],
)
def test_the_manifest_names_the_arithmetic_of_its_verification(
    to: str,
    precision: str,
    arithmetic: str,
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    tmp_path: Path,
) -> None:
    exported = export_merged(
        checkpoint,
        tmp_path / f"a{get_exporter(to).suffix}",
        to=to,
        precision=precision,
        backbone=BackboneSource(weights=backbone_weights),
        verify=VerifyOptions(images=photos, min_agreement=0.5),
    )
    manifest = json.loads(exported.manifest.read_text("utf-8"))
    assert manifest["verification"]["arithmetic"] == exported.arithmetic == arithmetic
    assert "verified_on_device" not in manifest["verification"]
    assert exported.device == "CPU"


def maps(*weights: NDArray[np.float32]) -> Any:
    """A graph of linear maps; the last is the classifier."""
    names = [f"w{place}" for place in range(len(weights))]
    results = [*(f"a{place}" for place in range(len(weights) - 1)), "logits"]
    nodes = [
        helper.make_node("MatMul", [source, name], [result], f"map of {name}")
        for source, name, result in zip(["pixel_values", *results], names, results, strict=False)
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("pixel_values", TensorProto.FLOAT, ["batch", 3, 1, len(weights[0])])],
        [info("logits", TensorProto.FLOAT, ["batch", 3, 1, weights[-1].shape[1]])],
        [numpy_helper.from_array(w, name) for w, name in zip(weights, names, strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def eye(scale: float) -> NDArray[np.float32]:
    return scale * np.eye(1, dtype=np.float32)


def spec(*pixels: int) -> ExportSpec:
    """A spec with images of one pixel; 255 is 1."""
    judged = np.array(pixels, np.uint8).reshape(-1, 1, 1, 1).repeat(3, -1)
    return export_spec(1, False, (0,) * 3, (1,) * 3, {}, "fp16", judged=judged)


@pytest.mark.parametrize("factor", [0.999, 1.001])
def test_tensors_within_the_headroom_of_the_range_stay_in_float32(
    factor: float,
) -> None:
    end = factor * LARGEST_FP16 / HEADROOM
    proto, left = in_range(maps(eye(end), eye(1e-3), eye(1)), spec(0, 255, 3))
    assert left == (["w0", "w1"] if factor > 1 else [])
    kinds = {i.name: i.data_type for i in proto.graph.initializer}
    low = TensorProto.FLOAT if factor > 1 else TensorProto.FLOAT16
    assert kinds == {"w0": low, "w1": low, "w2": TensorProto.FLOAT}


def test_every_image_is_measured_and_negative_values_count() -> None:
    for place in range(20):
        pixels = [1] * 20
        pixels[place] = 255
        _, left = in_range(maps(eye(-6e4), eye(1e-3), eye(1)), spec(*pixels))
        assert left == ["w0", "w1"]
    assert in_range(maps(eye(-6e4), eye(1e-3), eye(1)), spec(*[1] * 20))[1] == []


def test_inputs_three_times_larger_than_those_measured_do_not_overflow() -> None:
    for weight in (2.1e4, 1.6e4):
        proto, left = in_range(maps(eye(weight), eye(1e-3), eye(1)), spec(255))
        assert left == (["w0", "w1"] if weight > 2e4 else [])
        x = np.full((1, 3, 1, 1), 3, np.float32)
        found = reference(proto, pixel_values=x)
        np.testing.assert_allclose(found, 3e-3 * weight, rtol=2e-3)


def test_inputs_beyond_the_range_keep_the_first_product_in_float32() -> None:
    far = export_spec(1, False, (0,) * 3, (1e-6,) * 3, {}, "fp16", judged=spec(255).judged)
    proto, left = in_range(maps(eye(1e-6), eye(1), eye(1)), far)
    assert left == ["w0"]
    x = np.full((1, 3, 1, 1), 1e6, np.float32)
    np.testing.assert_allclose(reference(proto, pixel_values=x), 1, rtol=2e-3)


@pytest.mark.parametrize("size", [50, 300])
def test_an_attention_whose_scores_overflow_stays_in_float32(size: float) -> None:
    """q, k and v are far within the range; the scores are 3 · size²."""
    x = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 1, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3, 1, 3])
    proto = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("MatMul", ["pixel_values", "w"], ["q"]),
                helper.make_node("Attention", ["q"] * 3, ["a"], name="attention_0", scale=1.0),
                helper.make_node("MatMul", ["a", "v"], ["b"]),
                helper.make_node("MatMul", ["b", "head"], ["logits"]),
            ],
            "g",
            [x],
            [logits],
            [
                numpy_helper.from_array(values.astype(np.float32), name)
                for name, values in (("w", size * np.eye(3)), ("v", np.eye(3)), ("head", np.eye(3)))
            ],
        ),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=11,
    )
    judged = np.full((2, 1, 3, 3), 255, np.uint8)
    low, left = in_range(
        proto, export_spec((1, 3), False, (0,) * 3, (1,) * 3, {}, "fp16", judged=judged)
    )
    assert left == (["attention_0"] if size == 300 else [])
    inferred = onnx.shape_inference.infer_shapes(low, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    assert types["a"] == (TensorProto.FLOAT if size == 300 else TensorProto.FLOAT16)
    assert types["q"] == types["b"] == TensorProto.FLOAT16
    feed = np.ones((2, 3, 1, 3), np.float32)
    np.testing.assert_allclose(reference(low, pixel_values=feed), size, rtol=2e-3)
    assert np.isfinite(reference(emulated(low), pixel_values=feed)).all()
    everything = emulated(typed(proto, "fp16"))
    assert np.isfinite(reference(everything, pixel_values=feed)).all() == (size < 300)


def test_weights_that_are_subnormal_in_fp16_stay_in_float32() -> None:
    x = np.ones((1, 3, 1, 4), np.float32)
    generator = np.random.default_rng(0)
    for size, low in ((1e-3, True), (1e-6, False)):
        small = (size * generator.normal(size=(4, 4))).astype(np.float32)
        back = (generator.normal(size=(4, 4)) / size).astype(np.float32)
        proto = typed(maps(small, back, np.eye(4, dtype=np.float32)), "fp16")
        kinds = {i.name: i.data_type for i in proto.graph.initializer}
        assert (kinds["w0"] == TensorProto.FLOAT16) is low
        exact = x.astype(np.float64) @ small @ back
        found = reference(emulated(proto), pixel_values=x)
        np.testing.assert_allclose(found, exact, atol=2e-3 * np.abs(exact).max())


def test_magnitudes_are_computed_in_float32_and_listed_by_float32_names() -> None:
    low = typed(maps(eye(5e4), eye(3e4), eye(1)), "fp16")
    x = np.array([-1, 0.5, 0], np.float32).reshape(1, 3, 1, 1)
    found = magnitudes(low, lambda: [{"pixel_values": x}, {"pixel_values": 2 * x}])
    assert found == pytest.approx({"pixel_values": 2, "a0": 1e5, "a1": 3e9}, rel=1e-3)
    broken = magnitudes(low, lambda: [{"pixel_values": x * np.nan}, {"pixel_values": x}])
    assert np.isnan(list(broken.values())).all()


def test_nothing_is_measured_without_images_or_in_bf16() -> None:
    proto = maps(eye(5e4), eye(3e4), eye(1))
    alone = export_spec(1, False, (0,) * 3, (1,) * 3, {}, "fp16")
    wide = export_spec(1, False, (0,) * 3, (1,) * 3, {}, "bf16", judged=spec(255).judged)
    for each in (alone, wide):
        low, left = in_range(proto, each)
        assert left == []
        assert low == typed(proto, each.precision)
