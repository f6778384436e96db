from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
from accelerate.accelerator import Accelerator

from aoft_deploy.data.splits import Splits
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.training.loop import TrainingLoop
from aoft_deploy.training.model import create_model
from aoft_deploy.training.overview import overview
from aoft_deploy.training.reporting import Reporter
from aoft_deploy.training.run_folder import Progress, RunFolder
from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.backbones.bundled import WEIGHTS

SMALL = TrainingSettings(img_size=16, epochs=3, batch_size=16, precision="fp32")
SHAPES = load_task("shape", train=30, val=12, test=12)


def rows(
    splits: Splits = SHAPES,
    settings: TrainingSettings = SMALL,
    done: int = 0,
    left_out: int = 0,
    config: dict[str, object] | None = None,
) -> dict[str, str]:
    """The overview of a run, by the names of its rows."""
    tuned = create_model(settings, len(splits.classes))
    if config is not None:
        tuned.backbone.pretrained_cfg = config  # type: ignore[assignment]
    folder, accelerator = RunFolder(Path("runs/shapes")), Accelerator(mixed_precision="no")
    run = TrainingLoop(accelerator, tuned, splits, folder, settings, 0, Reporter(False))
    lines = overview(run, Progress(lines=[{}] * done), left_out)
    return {line[:10].rstrip(): line[10:] for line in lines}


def test_a_resumed_run_says_what_is_done_and_left_out() -> None:
    found = rows(done=2, left_out=1200)
    assert found["training"].startswith("3 epochs (2 of them done) of 2 steps, up to 16 images")
    assert found["left out"] == "1,200 unreadable images, listed in runs/shapes/unreadable.json"
    assert found["data"].startswith("shape, a built-in task: 54 images of 6 classes (circle, cro")


def test_a_missing_test_part_and_trained_val_images_are_told() -> None:
    without_test = replace(SHAPES, test=None)
    found = rows(without_test)
    assert found["test"].startswith("none, so accuracy is measured only on val, which also chooses")
    assert found["val"] == "12 images, 2 of each class"
    found = rows(without_test, replace(SMALL, train_on="train+val"))
    assert (found["val"], found["test"]) == ("12 images, 2 of each class, trained on", "none")


@pytest.mark.parametrize("method", ["full", "linear", "rlrr"])
def test_parameters_are_counted_as_by_timm(method: str) -> None:
    plain = timm.create_model("aoft_vit_nano", num_classes=0, img_size=16)
    size = sum(parameter.numel() for parameter in plain.parameters())
    found = rows(settings=replace(SMALL, method=method))
    assert f", {size:,} parameters, " in found["backbone"]
    share = {"full": f"{size:,} parameters (100.00% of", "linear": "0 parameters (0.00% of"}
    assert found["trained"].startswith(share.get(method, ""))
    assert found["trained"].endswith(" + 1,158 (classifier)")
    assert ("(classifier" in found["training"]) == (method != "linear")


def test_the_origin_of_the_weights_is_named() -> None:
    assert "bundled weights" in rows()["backbone"]
    from_file = rows(settings=replace(SMALL, backbone_weights=WEIGHTS))["backbone"]
    assert f"weights of {WEIGHTS}, input 16 x 16 pixels" in from_file
    config = timm.get_pretrained_cfg("vit_base_patch16_224.augreg_in21k")
    assert config is not None
    values = {name: value for name, value in asdict(config).items() if value is not None}
    hub = "weights of timm/vit_base_patch16_224.augreg_in21k on the Hugging Face Hub"
    assert hub in rows(config=values, settings=replace(SMALL, crop_pct=1.0))["backbone"]
