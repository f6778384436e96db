from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from faulty_model import metadata_of
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.artefacts.prediction import Classifier, load_classifier
from aoft_deploy.classes import Classes
from aoft_deploy.data.images import read_image
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import ArtefactError
from aoft_deploy.tuning.tuned_model import TunedModel


class FixedEngine:
    """An engine that always returns the same logits."""

    info: Mapping[str, str] = {}
    takes_pixels = False
    takes_tasks = False
    device = "cpu"

    def __init__(self, logits: object) -> None:
        self.logits = np.array(logits, np.float32)

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        return self.logits


def classifier(logits: object, classes: str = "abc") -> Classifier:
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(8, crop_pct=1.0, mean=half, std=half)
    return Classifier(FixedEngine(logits), Classes(classes), preprocessing)


IMAGE = Image.new("RGB", (10, 12))


@pytest.mark.parametrize("logits", [[[1.0, 2.0]], [[1.0] * 4], [[1.0] * 3] * 2, [1.0, 2.0, 3.0]])
def test_logits_whose_shape_does_not_fit_the_classes_are_refused(logits: object) -> None:
    with pytest.raises(ArtefactError, match="The artefact answers with shape"):
        classifier(logits).predict([IMAGE])


def test_the_artefact_gives_the_answers_of_the_trained_model_on_image_files(
    artefact: Path,
    photos: list[Path],
    make_tuned: Callable[..., TunedModel],
    classes: tuple[str, ...],
) -> None:
    loaded = load_classifier(artefact)
    images = [read_image(path) for path in photos]
    inputs = np.stack([loaded.preprocessing(image) for image in images])
    with torch.inference_mode():
        expected = make_tuned("rlrr")(torch.from_numpy(inputs)).softmax(1).numpy()
    np.testing.assert_allclose(loaded.scores(images), expected, atol=2e-5, rtol=0)
    assert loaded.classes == classes


def test_a_pixel_artefact_gives_the_same_probabilities(
    artefact: Path, pixel_artefact: Path, photos: list[Path]
) -> None:
    images = [read_image(path) for path in photos]
    found = load_classifier(pixel_artefact).scores(images)
    expected = load_classifier(artefact).scores(images)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def test_a_batch_gives_the_same_answers_as_single_images(
    artefact: Path, photos: list[Path]
) -> None:
    loaded = load_classifier(artefact)
    images = [read_image(path) for path in photos]
    single = np.concatenate([loaded.scores([image]) for image in images])
    np.testing.assert_allclose(loaded.scores(images), single, atol=1e-5, rtol=0)


def with_entries(artefact: Path, target: Path, **metadata: str | None) -> Path:
    """Copy an artefact with other metadata entries; None removes an entry."""
    model = onnx.load(artefact)
    values = metadata_of(artefact) | metadata
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {k: v for k, v in values.items() if v is not None})
    onnx.save(model, target)
    return target


@pytest.mark.parametrize(
    "metadata",
    [
        {"classes": None},
        {"preprocessing": None},
        {"classes": "no JSON"},
        {"classes": "7"},
        {"classes": "9" * 5000},
        {"classes": "[" * 100_000},
        {"preprocessing": "7"},
    ],
    ids=lambda metadata: str(metadata)[:30],
)
def test_an_artefact_without_valid_classes_and_preprocessing_is_refused(
    metadata: dict[str, str | None], artefact: Path, tmp_path: Path
) -> None:
    path = with_entries(artefact, tmp_path / "a.onnx", **metadata)
    with pytest.raises(
        ArtefactError, match=r"has no valid entry '(classes|preprocessing)' in its metadata"
    ):
        load_classifier(path)


def test_preprocessing_with_missing_keys_is_refused(artefact: Path, tmp_path: Path) -> None:
    path = with_entries(artefact, tmp_path / "a.onnx", preprocessing=json.dumps({"size": 16}))
    with pytest.raises(ArtefactError, match="Preprocessing has the keys size, expected"):
        load_classifier(path)


def test_one_image_has_a_list_of_predictions_and_several_have_a_list_of_lists(
    artefact: Path, photos: list[Path]
) -> None:
    loaded = load_classifier(str(artefact))
    one, many = loaded.predict(str(photos[0]), 2), loaded.predict(photos, 2)
    assert one == loaded.predict(Image.open(photos[0]), top=2)
    assert [len(row) for row in many] == [2] * 9
    assert [p.label for p in many[0]] == [p.label for p in one]


def test_a_softmax_of_one_output_is_refused_by_name(artefact: Path, tmp_path: Path) -> None:
    path = with_entries(artefact, tmp_path / "age.onnx", classes=json.dumps(["age"]))
    with pytest.raises(ArtefactError, match=r"age\.onnx has 1 output \('age'\), whose softmax is"):
        load_classifier(path)
    path = with_entries(artefact, tmp_path / "none.onnx", classes="[]")
    with pytest.raises(ArtefactError, match=r"none\.onnx has no output, but a model has 1"):
        load_classifier(path)


def test_an_artefact_without_an_activation_has_a_softmax(artefact: Path, tmp_path: Path) -> None:
    assert metadata_of(artefact)["activation"] == "softmax"
    path = with_entries(artefact, tmp_path / "old.onnx", activation=None)
    assert load_classifier(path).classes.activation == "softmax"


def test_an_artefact_answers_as_its_activation_says(
    artefact: Path, photos: list[Path], tmp_path: Path
) -> None:
    logits = load_classifier(with_entries(artefact, tmp_path / "a.onnx", activation="none"))
    labels = load_classifier(with_entries(artefact, tmp_path / "b.onnx", activation="sigmoid"))
    for photo in photos:
        positive = {answer.label for answer in logits.predict(photo) if answer[1] > 0}
        assert {answer.label for answer in labels.predict(photo)} == positive


def test_an_unknown_activation_is_refused(
    artefact: Path, fleet_artefact: Path, tmp_path: Path
) -> None:
    path = with_entries(artefact, tmp_path / "a.onnx", activation="relu")
    with pytest.raises(ArtefactError, match=r"a\.onnx: Unknown activation 'relu'\. Known: none, s"):
        load_classifier(path)
    tasks = json.loads(metadata_of(fleet_artefact)["tasks"])
    tasks[1]["activation"] = ["softmax"]
    path = with_entries(fleet_artefact, tmp_path / "fleet.onnx", tasks=json.dumps(tasks))
    with pytest.raises(ArtefactError, match=r"fleet\.onnx: Unknown activation "):
        load_classifier(path, "pets")


def test_a_fleets_task_of_one_output_is_refused_and_the_others_answer(
    fleet_artefact: Path, photos: list[Path], tmp_path: Path
) -> None:
    tasks = json.loads(metadata_of(fleet_artefact)["tasks"])
    tasks[1]["classes"] = ["age"]
    path = with_entries(fleet_artefact, tmp_path / "fleet.onnx", tasks=json.dumps(tasks))
    with pytest.raises(ArtefactError, match=r"The task birds of .* has 1 output \('age'\)"):
        load_classifier(path, "birds")
    assert load_classifier(path, "pets").predict([photos[0]])
