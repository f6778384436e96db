import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import UnknownNameError
from aoft_deploy.training.augmentation import (
    generator,
    image_transform,
    mirrored,
    mix,
    preserved_randomness,
    reseed,
)

HALVES = (0.5, 0.5, 0.5)
PREPROCESSING = Preprocessing(size=32, crop_pct=1.0, mean=HALVES, std=HALVES)


def photo(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("augment", ["affine", "window", "crop", "rand"])
def test_equal_keys_give_equal_crops_and_other_keys_do_not(augment: str) -> None:
    transform = image_transform(augment, replace(PREPROCESSING, crop_pct=0.8))

    def cropped(*key: int) -> np.ndarray:
        reseed(*key)
        return transform(photo())

    first = cropped(1, 2, 3)
    torch.rand(5), random.random(), np.random.rand()
    assert first.shape == (3, 32, 32)
    assert first.dtype == np.uint8
    assert np.array_equal(first, cropped(1, 2, 3))
    assert not np.array_equal(first, cropped(1, 2, 4))


def test_pillow_accepts_all_operations_of_rand_augment() -> None:
    transform = image_transform("rand", PREPROCESSING)
    for key in range(300):
        reseed(key)
        assert transform(photo()).shape == (3, 32, 32)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_a_window_is_cropped_from_the_image_as_resized_for_evaluation(mode: str) -> None:
    preprocessing = replace(PREPROCESSING, crop_pct=0.8, crop_mode=mode)
    whole = replace(preprocessing, size=40, crop_pct=1.0).pixels(photo()).transpose(2, 0, 1)
    windows = {
        whole[:, top : top + 32, left : left + 32][..., ::step].tobytes(): (top, left, step)
        for top in range(9)
        for left in range(9)
        for step in (1, -1)
    }
    transform, found = image_transform("window", preprocessing), set()
    for key in range(300):
        reseed(key)
        found.add(windows[np.ascontiguousarray(transform(photo())).tobytes()])
    for axis, values in enumerate((set(range(9)), set(range(9)), {1, -1})):
        assert {place[axis] for place in found} == values


@pytest.mark.parametrize("crop_pct", [1.0, 1.2])
def test_a_window_without_a_crop_is_the_image_or_its_mirror_image(crop_pct: float) -> None:
    preprocessing = replace(PREPROCESSING, crop_pct=crop_pct)
    pixels = preprocessing.pixels(photo()).transpose(2, 0, 1)
    transform = image_transform("window", preprocessing)
    for key in range(20):
        reseed(key)
        window = transform(photo())
        assert any(np.array_equal(window, each) for each in (pixels, pixels[..., ::-1]))


def test_only_some_augmentations_change_whole_images() -> None:
    with pytest.raises(UnknownNameError, match="Unknown augmentation of whole images 'flip'"):
        image_transform("flip", PREPROCESSING)


def test_half_of_the_images_are_mirrored() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)
    results = [mirrored(pixels, 0, i) for i in range(400)]
    turned = sum(np.array_equal(r, pixels[..., ::-1]) for r in results)
    assert turned + sum(np.array_equal(r, pixels) for r in results) == 400
    assert 150 < turned < 250


def test_generators_of_equal_keys_agree() -> None:
    assert generator(1, 2).random() == generator(1, 2).random()
    assert generator(1, 2).random() != generator(2, 1).random()


def test_the_callers_generators_stay_as_they_were() -> None:
    reseed(5)
    expected = random.random(), np.random.rand(), torch.rand(1)
    reseed(5)
    with preserved_randomness(torch.device("cpu")):
        reseed(6)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_without_mixing_images_stay_the_same_object() -> None:
    images = torch.rand(4, 3, 8, 8)
    mixed, share = mix(images, 0, 0, generator(0))
    assert mixed is images
    assert share == 1


@pytest.mark.parametrize("count", [4, 5])
def test_mixup_adds_an_image_and_its_partner_by_their_shares(count: int) -> None:
    images = torch.rand(count, 3, 8, 8, dtype=torch.float64)
    mixed, share = mix(images, 0.8, 0, generator(0))
    assert 0.5 <= share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))


def test_cutmix_pastes_as_many_pixels_of_the_partner_as_its_share_says() -> None:
    values = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    for seed in range(20):
        mixed, share = mix(values, 0, 1.0, generator(seed))
        assert 0.5 <= share <= 1
        assert mixed[0].mean().item() == pytest.approx(1 - share, abs=1e-6)
        assert mixed[1].mean().item() == pytest.approx(share, abs=1e-6)


def test_with_both_alphas_each_is_used_at_times() -> None:
    values = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    mixed = [mix(values, 1.0, 1.0, generator(seed))[0] for seed in range(20)]
    pasted = [m for m in mixed if set(m.flatten().tolist()) <= {0.0, 1.0}]
    assert pasted
    assert len(pasted) < 20
