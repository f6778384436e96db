"""Images as callers have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aoft_deploy.data.image_inputs import BATCH, answer_each, rgb_image
from aoft_deploy.data.images import read_image
from aoft_deploy.errors import ImageError


def sizes(images: list[Image.Image]) -> list[tuple[int, int]]:
    return [image.size for image in images]


def test_a_path_a_text_an_image_and_an_array_are_one_image(photos: list[Path]) -> None:
    wanted = read_image(photos[0])
    for given in (photos[0], str(photos[0]), Image.open(photos[0]), np.asarray(wanted)):
        np.testing.assert_array_equal(rgb_image(given), wanted)
        assert answer_each(given, sizes) == wanted.size


def test_many_images_are_answered_in_batches_in_their_order(photos: list[Path]) -> None:
    batches: list[int] = []

    def answer(images: list[Image.Image]) -> list[tuple[int, int]]:
        batches.append(len(images))
        return sizes(images)

    many = [photos[i % 9] for i in range(2 * BATCH + 1)]
    assert answer_each(iter(many), answer) == sizes([*map(read_image, many)])
    assert batches == [BATCH, BATCH, 1]
    assert answer_each(np.zeros((2, 4, 6, 3), np.uint8), sizes) == [(6, 4), (6, 4)]
    assert answer_each([], answer) == []
    assert answer_each((photos[0],), sizes) == [read_image(photos[0]).size]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_an_image_of_any_mode_becomes_what_reading_its_file_gives(
    mode: str, make_picture: Callable[..., Image.Image], tmp_path: Path
) -> None:
    picture = make_picture(9, 7, seed=1)
    if mode == "I;16":
        picture = Image.fromarray(np.arange(63, dtype=np.uint16).reshape(7, 9) * 1000)
    else:
        picture = picture.convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(Image.linear_gradient("L").resize((9, 7)))
    path = tmp_path / f"a.{'tiff' if mode == 'CMYK' else 'png'}"
    picture.save(path)
    np.testing.assert_array_equal(rgb_image(picture), read_image(path))


def test_the_orientation_of_an_opened_photograph_is_applied(
    make_picture: Callable[..., Image.Image], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    make_picture(9, 7, seed=1).save(tmp_path / "a.png", exif=exif)
    wanted = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(rgb_image(Image.open(tmp_path / "a.png")), wanted)
    np.testing.assert_array_equal(rgb_image(wanted), wanted)  # it is not turned again


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (7, "int is no image"),
        (np.zeros((4, 6)), r"ndarray of float64 \(4, 6\)"),
        (np.zeros((4, 6, 3)), r"ndarray of float64 \(4, 6, 3\)"),
        (np.zeros((4, 6, 4), np.uint8), r"ndarray of uint8 \(4, 6, 4\)"),
        (torch.zeros(3, 4, 6), r"Tensor of torch.float32 \(3, 4, 6\)"),
        ([torch.zeros(3, 4, 6)], r"Tensor of torch.float32 \(3, 4, 6\)"),
        (b"png", "bytes is no image"),
        (Image.new("F", (2, 2)), "32-bit values, which have no defined white"),
        ("missing.png", "Cannot read image 'missing.png': no such file"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image_is_refused(given: Any, kind: str) -> None:
    with pytest.raises(ImageError, match=kind):
        answer_each(given, sizes)
