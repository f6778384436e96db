"""Models in memory, and tasks whose outputs mean different things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aoft_deploy.artefacts.manifest import read_manifest
from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.data.images import read_image
from aoft_deploy.errors import CheckpointError, SettingError, VerificationError
from aoft_deploy.export.fleet import export_fleet
from aoft_deploy.export.merged import export_merged
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.files import file_digest
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.tuned_model import TunedModel

MEANINGS = {
    "pets": (("cat", "dog", "bird"), "softmax"),
    "fruit": (("ripe", "red", "round", "large"), "sigmoid"),
    "age": (("years",), "none"),
}


@pytest.fixture(scope="module")
def models(
    backbone_name: str, backbone_args: dict[str, Any], backbone_weights: Path
) -> dict[str, TunedModel]:
    """A model in memory for each of ``MEANINGS``, in training mode."""
    found = {}
    for seed, (name, (classes, activation)) in enumerate(MEANINGS.items()):
        model, identity = create_backbone(
            backbone_name, num_classes=len(classes), weights=backbone_weights, **backbone_args
        )
        found[name] = attach(model, "aoft-lora-star", backbone=identity)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in found[name].trained().values():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        found[name].classes, found[name].activation = classes, activation
        found[name].train()
    return found


def test_a_model_in_memory_gives_the_artefact_of_its_checkpoint(
    models: dict[str, TunedModel], backbone_weights: Path, tmp_path: Path
) -> None:
    model, source = (
        models["fruit"],
        BackboneSource(weights=backbone_weights),
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported = export_merged(model, str(tmp_path / "a.onnx"))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    save(model, tmp_path / "fruit.ckpt")
    export_merged(str(tmp_path / "fruit.ckpt"), tmp_path / "b.onnx", backbone=source)
    assert exported.path.read_bytes() == (tmp_path / "b.onnx").read_bytes()
    manifest = read_manifest(exported.manifest)
    assert manifest["checkpoint"]["sha256"] == file_digest(tmp_path / "fruit.ckpt")
    assert manifest["backbone"] == model.identity.to_dict()
    assert (manifest["activation"], manifest["forced"]) == ("sigmoid", False)


def test_a_model_in_memory_needs_the_path_of_the_artefact(models: dict[str, TunedModel]) -> None:
    with pytest.raises(SettingError, match="has no folder: give the artefact's path as `output`"):
        export_merged(models["pets"])


def test_a_model_in_memory_that_does_not_say_what_its_one_output_means_is_refused(
    backbone_name: str, backbone_weights: Path, backbone_args: dict[str, Any], tmp_path: Path
) -> None:
    model, identity = create_backbone(
        backbone_name, num_classes=1, weights=backbone_weights, **backbone_args
    )
    tuned = attach(model, "lora", backbone=identity)
    for use in (save, export_merged):
        with pytest.raises(CheckpointError, match=r"The model has 1 output \('0'\), whose softmax"):
            use(tuned, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_fleet_of_models_in_memory_answers_each_task_in_its_terms(
    models: dict[str, TunedModel], photos: list[Path], tmp_path: Path
) -> None:
    path = export_fleet(models, str(tmp_path / "fleet.onnx")).path
    manifest = read_manifest(Path(f"{path}.json"))
    assert {task["name"]: task["activation"] for task in manifest["tasks"]} == {
        name: activation for name, (_, activation) in MEANINGS.items()
    }
    fleet, images = Fleet(path, threads=1), [read_image(photo) for photo in photos]
    batch = np.stack([fleet.preprocessing(image) for image in images])
    for name, model in models.items():
        wanted = model.predict(photos)
        assert load_classifier(path, name).classes.activation == MEANINGS[name][1]
        rows = fleet.predict(batch, [name] * len(photos))
        for found in (
            load_classifier(path, name).predict(images),
            [answer.answers() for answer in rows],
        ):
            assert [[a.label for a in row] for row in found] == [
                [a.label for a in row] for row in wanted
            ]
            for row, other in zip(found, wanted, strict=True):
                np.testing.assert_allclose([a[1] for a in row], [a[1] for a in other], atol=2e-5)


def test_a_task_of_another_kind_of_output_can_join_a_running_fleet(
    models: dict[str, TunedModel], fleet_artefact: Path, photos: list[Path], tmp_path: Path
) -> None:
    fleet = Fleet(fleet_artefact, threads=1)
    models["age"].preprocessing = fleet.preprocessing
    save(models["age"], tmp_path / "age.ckpt")
    fleet.add(tmp_path / "age.ckpt")
    image = fleet.preprocessing(read_image(photos[0]))[None]
    (answer,) = fleet.predict(image, ["age"])
    assert fleet.classes("age").activation == answer.classes.activation == "none"
    (value,) = answer.answers()
    assert value[1] == pytest.approx(models["age"].predict(photos[0])[0][1], abs=2e-5)


def test_models_in_memory_need_names_in_a_fleet(
    models: dict[str, TunedModel], tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="has no task name: give `checkpoints` as a dict"):
        export_fleet([*models.values()], tmp_path / "fleet.onnx")  # type: ignore[list-item]


def test_plain_values_below_fp32_are_judged_by_their_differences(
    models: dict[str, TunedModel], photos: list[Path], tmp_path: Path
) -> None:
    verify = VerifyOptions(images=photos)
    report = export_merged(
        models["age"], tmp_path / "a.onnx", precision="fp16", verify=verify
    ).report
    assert report.agreement == 1 - report.relative < 1
    strict = VerifyOptions(images=photos, min_agreement=1.0)
    with pytest.raises(VerificationError, match="of the largest, but at most"):
        export_merged(models["age"], tmp_path / "b.onnx", precision="fp16", verify=strict)
