"""Several exports in one run: a graph is verified at all batch sizes once, weights always."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aoft_deploy.artefacts.manifest import read_manifest
from aoft_deploy.artefacts.registry import get_exporter
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import read_checkpoint, save
from aoft_deploy.errors import VerificationError
from aoft_deploy.export import export_each
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.onnx.engine import OnnxEngine


@pytest.fixture
def tasks(
    make_tuned: Callable[..., TunedModel],
    checkpoint: Path,
    classes: tuple[str, ...],
    tmp_path: Path,
) -> list[Path]:
    """Three tasks of two methods, whose merged models differ in their weights, and a wider one."""
    paths, prepared = [], read_checkpoint(checkpoint).preprocessing
    for seed, method in enumerate(("rlrr", "rlrr", "aoft-lora-star", "rlrr"), start=1):
        tuned = make_tuned(method, seed=seed)
        if seed == 4:
            torch.manual_seed(0)
            tuned.backbone.reset_classifier(len(classes) + 1)  # type: ignore[operator]
            classes = (*classes, "more")
        paths.append(tmp_path / f"task{seed}.ckpt")
        save(tuned, paths[-1], classes=classes, preprocessing=prepared)
    return paths


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all batches that an ONNX file has run."""
    run, seen = OnnxEngine.run, list[int]()

    def counted(engine: OnnxEngine, pixels: Any) -> Any:
        seen.append(len(pixels))
        return run(engine, pixels)

    monkeypatch.setattr(OnnxEngine, "run", counted)
    return seen


def test_a_graph_is_run_at_all_batch_sizes_once_and_each_task_is_run(
    tasks: list[Path], batches: list[int], backbone_weights: Path
) -> None:
    exports = export_each(tasks, backbone=BackboneSource(weights=backbone_weights))
    seen, found = [], []
    for exported in exports:
        seen.append(list(batches))
        found.append(exported.report)
        batches.clear()
        stated = read_manifest(exported.manifest)["verification"]
        assert stated["batch_sizes"] == list(exported.report.batch_sizes)
        assert stated["images"] == exported.report.images
        assert stated["same_graph_as"] == exported.report.same_graph_as
    assert seen == [[1, 2, 7], [2], [2], [1, 2, 7]]  # the last has another classifier
    assert [report.same_graph_as for report in found] == [None, "task1.onnx", "task1.onnx", None]
    assert [report.images for report in found] == [7, 2, 2, 7]
    assert len({report.max_abs for report in found}) > 1


def test_wrong_weights_of_a_later_task_are_refused(
    tasks: list[Path], backbone_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = get_exporter("onnx")

    def first_weights(model: Any, path: Path, spec: Any) -> None:
        exporter.export(models.setdefault("first", model), path, spec)

    models = dict[str, Any]()
    wrong = replace(exporter, export=first_weights)
    monkeypatch.setattr("aoft_deploy.export.merged.get_exporter", lambda name: wrong)
    exports = export_each(tasks[:2], backbone=BackboneSource(weights=backbone_weights))
    assert next(exports).report.same_graph_as is None
    with pytest.raises(VerificationError, match="At batch size 2 the artefact's logits differ"):
        next(exports)
    assert not tasks[1].with_suffix(".onnx").exists()


def test_all_real_images_are_compared_for_every_task(
    tasks: list[Path], batches: list[int], backbone_weights: Path, photos: list[Path]
) -> None:
    exports = export_each(
        tasks[:2],
        backbone=BackboneSource(weights=backbone_weights),
        verify=VerifyOptions(images=photos),
    )
    first, second = exports
    assert first.report.images == second.report.images == 7 + len(photos)
    assert second.report.same_graph_as is None
    half = len(batches) // 2
    assert batches[:half] == batches[half:]
    assert batches[:3] == [1, 2, 7]


def test_another_run_trusts_no_earlier_one(
    tasks: list[Path], batches: list[int], backbone_weights: Path
) -> None:
    for task in tasks[:2]:
        (exported,) = export_each([task], backbone=BackboneSource(weights=backbone_weights))
        assert exported.report.batch_sizes == (1, 2, 7)
    assert batches == [1, 2, 7, 1, 2, 7]
