"""FP8: linear layers with calibrated scales, which TensorRT reads and every runtime can emulate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from specs import export_spec

from aoft_deploy.classes import Classes
from aoft_deploy.cli.export import main
from aoft_deploy.cli.inspect import main as inspect_main
from aoft_deploy.data.images import read_image
from aoft_deploy.data.listing import image_files
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import SettingError
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.graph.emulation import emulated
from aoft_exporters.graph.low_precision import typed
from aoft_exporters.onnx import exporter
from aoft_exporters.onnx.fp8 import LARGEST_FP8, in_fp8, linear_layers, scale
from aoft_exporters.onnx.fp16_ranges import in_range, magnitudes

FC1 = "blocks.0.mlp.fc1.weight"
PREPROCESSING = Preprocessing(
    16, crop_pct=0.9, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


def run(proto: Any, **feed: NDArray[Any]) -> NDArray[np.float32]:
    import onnxruntime

    ort: Any = onnxruntime
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, feed)[0]
    return result


def layers(*weights: list[list[float]]) -> Any:
    """A graph of linear layers on the three channels of one pixel; the last is the classifier."""
    names = [*(f"w{i}" for i in range(len(weights) - 1)), "head"]
    results = ["flat", *(f"a{i}" for i in range(len(weights) - 1)), "logits"]
    nodes = [helper.make_node("Reshape", ["pixel_values", "shape"], ["flat"])]
    for source, name, result in zip(results, names, results[1:], strict=False):
        nodes.append(helper.make_node("MatMul", [source, name], [result], name))
    stored = [numpy_helper.from_array(np.array([0, 3]), "shape")]
    stored += [
        numpy_helper.from_array(np.array(w, np.float32), name)
        for w, name in zip(weights, names, strict=True)
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("pixel_values", TensorProto.FLOAT, ["batch", 3, 1, 1])],
        [info("logits", TensorProto.FLOAT, ["batch", len(weights[-1][0])])],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def low_spec(pixels: NDArray[np.uint8], least: float = 0.0) -> Any:
    """A spec with images of one pixel; 255 is 1."""
    metadata = {"classes": json.dumps(["a", "b"]), "activation": "softmax"}
    return export_spec(
        1, False, (0,) * 3, (1,) * 3, metadata, "fp8", pixels, min_agreement=least, judged=pixels
    )


def fp8(values: NDArray[Any], scales: NDArray[Any] | float) -> NDArray[np.float64]:
    """Values after a round trip through FP8 with these scales."""
    quotient = np.clip(np.asarray(values, np.float32) / np.float32(scales), -448, 448)
    rounded: NDArray[np.float64] = quotient.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return rounded * np.asarray(scales, np.float64)


def test_the_graph_rounds_factors_to_fp8_as_ml_dtypes_does() -> None:
    generator = np.random.default_rng(0)
    w0, w1 = generator.normal(size=(3, 5)), generator.normal(size=(5, 4)) * [1, 10, 0.1, 0]
    head = np.eye(4).tolist()
    pixels = generator.integers(0, 256, (20, 1, 1, 3)).astype(np.uint8)
    low, left = in_range(layers(w0.tolist(), w1.tolist(), head), low_spec(pixels))
    assert left == []
    stored = {t.name: numpy_helper.to_array(t) for t in low.graph.initializer}
    x = (pixels[:, 0, 0, :, None, None] / np.float32(255)).astype(np.float32)
    expected: NDArray[Any] = x[:, :, 0, 0].astype(np.float16)
    exact: NDArray[Any] = expected
    for name, weight in (("w0", w0), ("w1", w1)):
        weight = weight.astype(np.float16).astype(np.float32)
        scales = stored[f"{name}_scale"]
        np.testing.assert_allclose(scales, scale(np.abs(weight).max(0)))
        most = np.abs(exact).max()
        np.testing.assert_allclose(stored[f"{name}_input_scale"], most / 448, rtol=2e-3)
        exact = exact @ weight
        left_factor = fp8(expected, stored[f"{name}_input_scale"])
        expected = (left_factor @ fp8(weight, scales)).astype(np.float16)
        quantised = stored[f"{name}_quantized"]
        assert quantised.dtype == ml_dtypes.float8_e4m3fn
        assert np.abs(quantised.astype(np.float32)).max(0).tolist()[:3] == [448] * 3
    assert np.ptp(expected) > 1
    evaluator: Any = ReferenceEvaluator(low)
    found = {
        "emulated": run(emulated(low), pixel_values=x),
        "ONNX Runtime": run(low, pixel_values=x),
        "onnx": evaluator.run(None, {"pixel_values": x})[0],
    }
    for values in found.values():  # a sum that falls between two FP8 numbers may go either way
        error = np.abs(values - expected.astype(np.float32))
        assert np.quantile(error, 0.9) < 2e-3 * np.ptp(expected)
        assert error.max() < 0.07 * np.ptp(expected)
    assert np.abs(found["emulated"] - exact).max() > 5e-3 * np.ptp(exact)


def test_a_scale_is_the_smallest_in_fp16_that_does_not_saturate() -> None:
    generator = np.random.default_rng(0)
    largest = (np.abs(generator.normal(size=1000)) * 10.0 ** generator.integers(-3, 4, 1000)) + 1e-3
    scales = scale(largest)
    exact = largest.astype(np.float32).astype(np.float64) / LARGEST_FP8
    lower = np.nextafter(scales, np.float16(0))
    assert (scales.astype(np.float64) >= exact * (1 - 1e-7)).all()
    assert (lower.astype(np.float64) < exact).all()
    assert scale(np.array([0.0, 448.0, 1e-30])).tolist() == [1, 1, 2.0**-24]


def test_layers_whose_rounding_changes_decisions_stay_in_fp16() -> None:
    """The input of w1 is 0.97 and 1, which are the same number in FP8 with its scale."""
    same = [[1.0, 0.0], [0.0, 1.0]]
    proto = layers([[0.97, 1.0], [0.0, 0.0], [0.0, 0.0]], same, same)
    pixels = np.full((16, 1, 1, 3), 255, np.uint8)
    low = typed(proto, "fp16")
    x = np.ones((16, 3, 1, 1), np.float32)

    def feeds() -> list[dict[str, Any]]:
        return [{"pixel_values": x[:8]}, {"pixel_values": x[8:]}]

    largest = magnitudes(low, feeds)
    classes = [Classes(("a", "b"))]
    for least, kept in ((0.0, []), (0.99, ["w1"])):
        result, left = in_fp8(low, largest, feeds, classes, least)
        assert left == kept
        kinds = {t.name: t.data_type for t in result.graph.initializer}
        assert kinds["w0_quantized"] == TensorProto.FLOAT8E4M3FN
        assert ("w1_quantized" in kinds) is (least == 0)
        assert "fp8_layers" not in {value.name for value in result.graph.input}
        logits = run(emulated(result), pixel_values=x[:1])[0]
        assert (logits[1] > logits[0]) is np.bool_(least > 0)
    assert in_range(proto, low_spec(pixels, 0.99))[1] == ["w1"]


def test_linear_layers_are_quantised_and_nothing_else(
    make_tuned: Callable[..., TunedModel], photos: list[Path]
) -> None:
    tuned = make_tuned("rlrr")
    pixels = np.stack([PREPROCESSING.pixels(read_image(path)) for path in photos])
    spec = export_spec(
        16, False, PREPROCESSING.mean, PREPROCESSING.std, {}, "fp8", pixels, judged=pixels
    )
    from aoft_exporters.graph.models import plain_graph

    merged = merge(tuned)
    low, _ = in_range(plain_graph(merged, spec), spec)
    onnx.checker.check_model(low, full_check=True)
    kinds = {t.name: t.data_type for t in low.graph.initializer}
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    quantised = {name for name, kind in kinds.items() if kind == TensorProto.FLOAT8E4M3FN}
    assert quantised == {"fp8_zero", *(f"blocks.0.{name}.weight_quantized" for name in names)}
    assert kinds["patch_embed.proj.weight"] == TensorProto.FLOAT16
    assert kinds["head.weight"] == TensorProto.FLOAT
    assert set(linear_layers(low)) == set()

    largest: dict[str, float] = {}

    def measure(module: Any, inputs: Any, name: str) -> None:
        largest[name] = float(inputs[0].abs().max())

    for name in names:
        layer = merged.get_submodule(f"blocks.0.{name}")
        layer.register_forward_pre_hook(lambda m, x, n=name: measure(m, x, n))
    with torch.inference_mode():
        merged.eval()(torch.from_numpy(spec.input.prepare(pixels)))
    stored = {t.name: numpy_helper.to_array(t) for t in low.graph.initializer}
    for name in names:
        found = float(stored[f"blocks.0.{name}.weight_input_scale"])
        assert found == pytest.approx(largest[name] / 448, rel=5e-3)


@pytest.mark.parametrize(("to", "fleet"), [("onnx", False), ("onnx", True), ("triton", False)])
def test_fp8_is_exported_verified_and_named(
    to: str,
    fleet: bool,
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    photos: list[Path],
    training_images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task, output = tmp_path / "task.ckpt", tmp_path / ("a.onnx" if to == "onnx" else "a")
    task.write_bytes(make_checkpoint("aoft-lora-star").read_bytes())
    options: list[Any] = [
        "--fleet" if fleet else "--merge",
        task,
        "--backbone-weights",
        backbone_weights,
    ]
    options += ["--precision", "fp8", "--images", photos[0].parent, "--calibrate", training_images]
    options += ["--to", to, "-o", output, "--min-agreement", 0.7]
    assert main([str(option) for option in options]) == 0
    printed = capsys.readouterr().out
    assert "NOT VERIFIED ON DEVICE: no runtime on the CPU computes in fp8" in printed
    file = output / "1" / "model.onnx" if to == "triton" else output
    proto = onnx.load(file)
    kinds = {t.name: t.data_type for t in proto.graph.initializer}
    assert kinds[f"{FC1}_quantized"] == TensorProto.FLOAT8E4M3FN
    assert not fleet or kinds["bank"] == TensorProto.FLOAT
    assert proto.opset_import[0].version == 20  # TensorRT reads no softmax_precision
    manifest = json.loads(output.with_name(f"{output.name}.json").read_text("utf-8"))
    assert manifest["precision"] == "fp8"
    assert manifest["calibration"] == {"images": 16, "left_in_float": []}
    verification = manifest["verification"]
    assert verification["verified_on_device"] is False
    assert 1e-4 < verification["max_abs"] < 0.3
    assert inspect_main([str(output)]) == 0
    assert "fp8" in capsys.readouterr().out
    if not fleet:  # a CPU computes the file in fp16, from the same rounded factors
        pixels = np.stack([PREPROCESSING.pixels(read_image(p)) for p in image_files(photos)])
        spec = export_spec(16, False, PREPROCESSING.mean, PREPROCESSING.std, {})
        x = spec.input.prepare(pixels)
        emulation, found = exporter.emulation(file).run(x), exporter.load(file).run(x)
        assert np.abs(found - emulation).max() < 0.1 * np.ptp(emulation)


def test_fp8_without_calibration_images_is_refused(
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--images", photos[0]]
    line = refused(main, *options, "--precision", "fp8", "-o", tmp_path / "a.onnx")
    assert line.startswith("fp8 of onnx needs calibration images: give 16 or more")
    with pytest.raises(SettingError, match="fp8 needs calibration images: give them with"):
        in_range(layers([[1.0]], [[1.0]]), export_spec(1, False, (0,) * 3, (1,) * 3, {}, "fp8"))


def test_tensorrt_builds_an_engine_from_the_graph(
    make_tuned: Callable[..., TunedModel], photos: list[Path]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from aoft_exporters.graph.models import plain_graph
    from aoft_exporters.tensorrt.build import build
    from aoft_exporters.tensorrt.library import target

    pixels = np.stack([PREPROCESSING.pixels(read_image(path)) for path in photos])
    spec = export_spec(
        16, False, PREPROCESSING.mean, PREPROCESSING.std, {}, "fp8", pixels, judged=pixels
    )
    low, _ = in_range(plain_graph(merge(make_tuned("rlrr")), spec), spec)
    assert build(low.SerializeToString(), target("8.9"), (1, 2, 4))
