"""A model of images that are not square: exported, run, described, and in a fleet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.checkpoints.opening import open_checkpoint
from aoft_deploy.cli.inspect import describe
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.export.fleet import export_fleet
from aoft_deploy.export.merged import export_merged
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.training.augmentation import image_transform
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone

HEIGHT, WIDTH = 32, 48
PREPROCESSING = Preprocessing((HEIGHT, WIDTH), 0.9, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "wide.safetensors"
    model = timm.create_model("vit_tiny_patch16_224", img_size=(HEIGHT, WIDTH), num_classes=0)
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(weights: Path) -> Path:
    model, identity = create_backbone(
        "vit_tiny_patch16_224", num_classes=3, weights=weights, img_size=(HEIGHT, WIDTH)
    )
    tuned = attach(model, "aoft-lora-star", backbone=identity, rank=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    path = weights.with_name("wide.ckpt")
    save(tuned, path, classes=("a", "b", "c"), preprocessing=PREPROCESSING, training={})
    return path


def unmerged(checkpoint: Path, weights: Path, images: NDArray[Any]) -> NDArray[Any]:
    tuned, _ = open_checkpoint(checkpoint, BackboneSource(weights=weights))
    with torch.inference_mode():
        logits: NDArray[Any] = tuned(torch.from_numpy(images)).numpy()
    return logits


@pytest.mark.parametrize(
    ("to", "uint8"),
    [("onnx", False), ("onnx", True), ("openvino", False), ("triton", True), ("timm", False)],
)
def test_every_exporter_takes_images_that_are_not_square(
    to: str, uint8: bool, checkpoint: Path, weights: Path, tmp_path: Path
) -> None:
    suffix = {"onnx": ".onnx", "timm": ".safetensors"}.get(to, "")
    output = tmp_path / f"wide{suffix}"
    done = export_merged(
        checkpoint, output, to=to, uint8=uint8, backbone=BackboneSource(weights=weights)
    )
    manifest = json.loads(done.manifest.read_text("utf-8"))
    side = [HEIGHT, WIDTH, 3] if uint8 else [3, HEIGHT, WIDTH]
    assert manifest["input"]["shape"] == ["batch", *side]
    assert manifest["preprocessing"]["size"] == [HEIGHT, WIDTH]
    assert describe(output)["preprocessing"]["size"] == [HEIGHT, WIDTH]
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (50, 90, 3), dtype=np.uint8))
    given = PREPROCESSING.pixels(picture) if uint8 else PREPROCESSING(picture)
    expected = unmerged(checkpoint, weights, PREPROCESSING(picture)[None])
    np.testing.assert_allclose(load_artefact(output).run(given[None]), expected, atol=1e-4)
    odds = np.exp(expected[0] - expected[0].max())
    (answer,) = load_classifier(output).predict([picture], 3)
    found = {prediction.label: prediction[1] for prediction in answer}
    np.testing.assert_allclose([found[n] for n in "abc"], odds / odds.sum(), atol=1e-4)


def test_a_fleet_takes_images_that_are_not_square(
    checkpoint: Path, weights: Path, tmp_path: Path
) -> None:
    done = export_fleet([checkpoint], tmp_path / "f.onnx", backbone=BackboneSource(weights=weights))
    fleet = Fleet(done.path, threads=1)
    x = np.random.default_rng(1).normal(size=(2, 3, HEIGHT, WIDTH)).astype(np.float32)
    found = np.stack([answer.logits for answer in fleet.predict(x, ["wide"] * 2)])
    np.testing.assert_allclose(found, unmerged(checkpoint, weights, x), atol=1e-4)


@pytest.mark.parametrize("augment", ["affine", "window", "crop", "rand"])
def test_augmentations_give_images_of_the_inputs_size(augment: str) -> None:
    picture = Image.fromarray(np.zeros((90, 70, 3), np.uint8))
    assert image_transform(augment, PREPROCESSING)(picture).shape == (3, HEIGHT, WIDTH)
