"""Float layers of an int8 artefact: in bf16 where it is fast and the answers hold, else in fp32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.registry import get_exporter
from aoft_deploy.artefacts.verification import Report
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.errors import VerificationError
from aoft_deploy.export.float_layers import lower_float_layers
from aoft_deploy.export.merged import export_merged
from aoft_deploy.export.options import VerifyOptions
from aoft_exporters.openvino import library
from aoft_exporters.openvino.exporter import EXPORTER

IN_FP32 = Report(9, (1, 2, 7), 0.25, 0.125, 0.75, None)
IN_BF16 = replace(IN_FP32, max_abs=0.5)


INT8 = ArtefactInfo({"precision": "int8", "flops": "7"})


def with_bf16(is_faster: bool) -> Exporter:
    """The exporter on a machine where bf16 is faster, or is not, for a model of 7 FLOPs."""
    assert EXPORTER.float_layers is not None
    layers = replace(EXPORTER.float_layers, is_faster=lambda flops: flops == 7 and is_faster)
    return replace(EXPORTER, float_layers=layers)


@pytest.fixture(scope="module")
def exported(
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    make_picture: Callable[..., Image.Image],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A task in int8, exported as on a processor with bf16 if its model were large."""
    folder = tmp_path_factory.mktemp("float_layers")
    images = folder / "images"
    images.mkdir()
    for i in range(20):
        make_picture(20 + i, 24, seed=100 + i).save(images / f"{i:02}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aoft_exporters.openvino.exporter.computes_bf16", lambda core: True)
        patch.setattr("aoft_exporters.openvino.exporter.LEAST_FLOPS", 10_000)
        return export_merged(
            checkpoint,
            folder / "task",
            to="openvino",
            precision="int8",
            backbone=BackboneSource(weights=backbone_weights),
            verify=VerifyOptions([photos[0].parent], [images], min_agreement=0.5),
        ).path


@pytest.fixture
def draft(exported: Path, tmp_path: Path) -> Path:
    """The artefact as it is before its float layers are lowered."""
    path = tmp_path / "draft"
    shutil.copytree(exported, path)
    assert EXPORTER.float_layers is not None
    EXPORTER.float_layers.state(path, "fp32")
    return path


def test_the_artefact_states_bf16_and_the_manifest_has_both_verifications(exported: Path) -> None:
    manifest = json.loads(exported.with_name("task.json").read_text("utf-8"))
    verification = manifest["verification"]
    assert verification["arithmetic"] == "int8 by openvino on CPU, float layers in bf16"
    layers = verification["float_layers"]
    assert layers["precision"] == "bf16"
    assert set(layers["in_fp32"]) == {"max_abs", "relative", "agreement"}
    computed = library.computes_bf16(library.openvino_library().Core())
    assert (layers["in_fp32"]["max_abs"] != verification["max_abs"]) == computed
    assert EXPORTER.load(exported, EngineOptions()).info["float_layers"] == "bf16"
    described: Any = EXPORTER.describe(exported)
    assert described["float_layers"] == "bf16"


@pytest.mark.parametrize(("has_bf16", "arithmetic"), [(True, "bf16"), (False, "f32")])
def test_a_processor_without_bf16_computes_the_float_layers_in_float32(
    has_bf16: bool, arithmetic: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = library.openvino_library().Core()
    if has_bf16 and not library.computes_bf16(core):
        pytest.skip("the processor does not compute in bf16")
    monkeypatch.setattr(library, "computes_bf16", lambda core: has_bf16)
    engine: Any = EXPORTER.load(exported, EngineOptions())
    assert engine.arithmetic == arithmetic
    exact: Any = EXPORTER.load(exported, EngineOptions())
    images = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    monkeypatch.setattr(library, "computes_bf16", lambda core: False)
    exact = EXPORTER.load(exported, EngineOptions()).run(images)
    difference = np.abs(engine.run(images) - exact).max()
    assert (1e-4 < difference < 0.1 * np.ptp(exact)) if has_bf16 else difference == 0


def test_the_lower_precision_is_stated_before_it_is_verified(draft: Path) -> None:
    seen: list[str] = []

    def verify(engine: Engine) -> Report:
        seen.append(engine.info["float_layers"])
        return IN_BF16

    lowered = lower_float_layers(with_bf16(True), draft, INT8, IN_FP32, verify)
    assert seen == ["bf16"]
    assert lowered is not None and lowered.report is IN_BF16
    in_fp32 = {"max_abs": 0.25, "relative": 0.125, "agreement": 0.75}
    assert lowered.to_dict() == {"float_layers": {"precision": "bf16", "in_fp32": in_fp32}}


def test_answers_that_differ_leave_the_float_layers_in_fp32(draft: Path) -> None:
    before = {file.name: file.read_bytes() for file in draft.iterdir()}

    def verify(engine: Engine) -> Report:
        assert engine.info["float_layers"] == "bf16"
        raise VerificationError("The answers differ.")

    assert lower_float_layers(with_bf16(True), draft, INT8, IN_FP32, verify) is None
    assert {file.name: file.read_bytes() for file in draft.iterdir()} == before
    assert EXPORTER.load(draft, EngineOptions()).info["float_layers"] == "fp32"


@pytest.mark.parametrize(
    ("exporter", "info"),
    [
        (with_bf16(False), INT8),
        (with_bf16(True), INT8.having(precision="fp32")),
        (with_bf16(True), ArtefactInfo({"precision": "int8"})),
        (get_exporter("onnx"), INT8),
    ],
)
def test_nothing_is_verified_again_if_no_lower_precision_is_faster(
    exporter: Exporter, info: ArtefactInfo, tmp_path: Path
) -> None:
    def verify(engine: Engine) -> Report:
        raise AssertionError

    assert lower_float_layers(exporter, tmp_path / "a", info, IN_FP32, verify) is None


def test_openvino_lowers_the_layers_of_large_models_on_processors_with_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert EXPORTER.float_layers is not None
    for has_bf16 in (True, False):
        monkeypatch.setattr(
            "aoft_exporters.openvino.exporter.computes_bf16", lambda core, has=has_bf16: has
        )
        assert EXPORTER.float_layers.is_faster(35 * 10**9) == has_bf16
        assert not EXPORTER.float_layers.is_faster(2 * 10**9)
