from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.artefacts import image_stream
from aoft_deploy.artefacts.image_stream import BATCH, READERS, Source, classify_stream
from aoft_deploy.artefacts.prediction import Classifier, load_classifier
from aoft_deploy.data.images import read_image
from aoft_deploy.errors import ImageError


class Recorded:
    """An engine that keeps the sizes of its batches."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.sizes = engine, list[int]()
        self.takes_pixels = engine.takes_pixels

    def run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        self.sizes.append(len(images))
        logits: NDArray[np.float32] = self.engine.run(images)
        return logits


@pytest.fixture
def classifier(artefact: Path) -> Classifier:
    loaded = load_classifier(artefact)
    return replace(loaded, engine=Recorded(loaded.engine))  # type: ignore[arg-type]


def test_answers_come_in_order_between_images_that_cannot_be_read(
    classifier: Classifier, photos: list[Path], tmp_path: Path
) -> None:
    paths = [photos[i % 9] if i % 7 else tmp_path / f"missing {i}" for i in range(40)]
    content = photos[0].read_bytes()
    sources: list[Source] = [("-", content), *((str(path), path) for path in paths)]
    found = list(classify_stream(classifier, sources, 2))
    assert [name for name, _ in found] == ["-", *map(str, paths)]
    for (_, answer), path in zip(found, [photos[0], *paths], strict=True):
        if path.exists():
            (expected,) = classifier.predict([read_image(path)], 2)
            assert [p.label for p in answer] == [p.label for p in expected]  # type: ignore[union-attr]
        else:
            assert isinstance(answer, ImageError)


def test_a_few_images_are_read_ahead(classifier: Classifier, photos: list[Path]) -> None:
    taken: list[int] = []

    def sources() -> Iterator[Source]:
        for number in range(1000):
            taken.append(number)
            yield str(number), photos[0]

    stream = classify_stream(classifier, sources())
    next(stream)
    assert BATCH <= len(taken) <= BATCH + READERS + 2
    assert len(list(stream)) == 999
    assert set(classifier.engine.sizes) == {BATCH, 1000 % BATCH}  # type: ignore[attr-defined]


def test_a_batch_has_a_limited_number_of_pixels(
    classifier: Classifier, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Image.open(photos[0]) as image:
        monkeypatch.setattr(image_stream, "PIXELS", 2 * image.width * image.height)
    assert len(list(classify_stream(classifier, [("", photos[0])] * 5))) == 5
    assert classifier.engine.sizes == [2, 2, 1]  # type: ignore[attr-defined]
