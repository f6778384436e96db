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

from aoft_deploy.artefacts.prediction import Classifier, Prediction, load_classifier, ranked
from aoft_deploy.data.images import read_image
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import ArtefactError, ImageError, VerificationError
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
    return Classifier(FixedEngine(logits), tuple(classes), preprocessing)


IMAGE = Image.new("RGB", (10, 12))


def test_probabilities_are_the_softmax_of_the_logits() -> None:
    found = classifier([[1.0, 2.0, 3.0]]).probabilities([IMAGE])
    expected = np.exp([1, 2, 3]) / np.exp([1, 2, 3]).sum()
    np.testing.assert_allclose(found, [expected], atol=1e-6, rtol=0)


def test_large_logits_do_not_overflow() -> None:
    found = classifier([[1e4, 0.0, -1e4]]).probabilities([IMAGE])
    np.testing.assert_array_equal(found, [[1, 0, 0]])


def test_classes_are_sorted_by_probability_and_ties_keep_their_order() -> None:
    ((first, second, third),) = classifier([[0.0, 2.0, 2.0]]).classify([IMAGE], top=3)
    assert [first.label, second.label, third.label] == ["b", "c", "a"]
    assert isinstance(first, Prediction)
    assert first.probability == second.probability > third.probability


def test_top_is_limited_to_the_number_of_classes() -> None:
    assert len(classifier([[0.0, 2.0, 1.0]]).classify([IMAGE], top=99)[0]) == 3


@pytest.mark.parametrize("logits", [[[1.0, 2.0]], [[1.0] * 4], [[1.0] * 3] * 2, [1.0, 2.0, 3.0]])
def test_logits_whose_shape_does_not_fit_the_classes_are_refused(logits: object) -> None:
    with pytest.raises(ArtefactError, match="The artefact answers with shape"):
        classifier(logits).classify([IMAGE])


def test_an_image_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(ImageError, match="mode 'L', expected 'RGB'"):
        classifier([[1.0, 2.0, 3.0]]).classify([IMAGE.convert("L")])


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
    np.testing.assert_allclose(loaded.probabilities(images), expected, atol=2e-5, rtol=0)
    assert loaded.classes == classes


def test_a_pixel_artefact_gives_the_same_probabilities(
    artefact: Path, pixel_artefact: Path, photos: list[Path]
) -> None:
    images = [read_image(path) for path in photos]
    found = load_classifier(pixel_artefact).probabilities(images)
    expected = load_classifier(artefact).probabilities(images)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def test_a_batch_gives_the_same_answers_as_single_images(
    artefact: Path, photos: list[Path]
) -> None:
    loaded = load_classifier(artefact)
    images = [read_image(path) for path in photos]
    single = np.concatenate([loaded.probabilities([image]) for image in images])
    np.testing.assert_allclose(loaded.probabilities(images), single, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = np.array([[1.0, 2.0, 3.0], [0.0, value, 1.0]], np.float32)
    with pytest.raises(VerificationError, match=f"answers with {value}, not with a number"):
        classifier(logits).classify([IMAGE, IMAGE])
    with pytest.raises(VerificationError, match=f"answers with {value}, not with a number"):
        ranked(logits, "abc", 1)
    assert ranked(logits[:1], "abc", 1)[0][0].label == "c"


def test_a_single_model_of_one_output_is_refused_by_name(artefact: Path, tmp_path: Path) -> None:
    path = with_entries(artefact, tmp_path / "age.onnx", classes=json.dumps(["age"]))
    with pytest.raises(ArtefactError, match=r"age\.onnx has 1 output \('age'\), but a classifier"):
        load_classifier(path)
    path = with_entries(artefact, tmp_path / "none.onnx", classes="[]")
    with pytest.raises(ArtefactError, match=r"none\.onnx has no output, but a classifier has 2"):
        load_classifier(path)


def test_a_fleets_task_of_one_output_is_refused_and_the_others_answer(
    fleet_artefact: Path, photos: list[Path], tmp_path: Path
) -> None:
    tasks = json.loads(load_classifier(fleet_artefact, "pets").engine.info["tasks"])
    tasks[1]["classes"] = ["age"]
    path = with_entries(fleet_artefact, tmp_path / "fleet.onnx", tasks=json.dumps(tasks))
    with pytest.raises(ArtefactError, match=r"The task birds of .* has 1 output \('age'\)"):
        load_classifier(path, "birds")
    assert load_classifier(path, "pets").classify([read_image(photos[0])])
