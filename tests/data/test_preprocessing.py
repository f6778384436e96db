from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import CheckpointError, ImageError, SettingError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
USUAL = Preprocessing(size=224, crop_pct=0.9, mean=MEAN, std=STD)


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng([width, height])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def config(size: int | tuple[int, int] = 32, **changes: Any) -> dict[str, Any]:
    usual = {"crop_pct": 0.9, "mean": MEAN, "std": STD, "interpolation": "bicubic"}
    height, width = (size, size) if isinstance(size, int) else size
    return {"input_size": (3, height, width), "crop_mode": "center", **usual, **changes}


def timm_pixels(config: dict[str, Any], image: Image.Image) -> np.ndarray[Any, Any]:
    transform = create_transform(**config, is_training=False, normalize=False)
    pixels: np.ndarray[Any, Any] = transform(image).permute(1, 2, 0).numpy()
    return pixels


def assert_like_timm(config: dict[str, Any], image: Image.Image) -> None:
    preprocessing = Preprocessing.from_timm(config)
    np.testing.assert_array_equal(preprocessing.pixels(image), timm_pixels(config, image))
    ours = preprocessing(image)
    theirs = create_transform(**config, is_training=False)(image)
    torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=0, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 160),
    height=st.integers(1, 160),
    size=st.integers(2, 64),
    crop_pct=st.sampled_from([0.875, 0.9, 0.95, 1.0, 1.15]),
    interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos"]),
    crop_mode=st.sampled_from(["center", "squash"]),
)
def test_agrees_with_timm_for_images_of_any_size(
    width: int, height: int, size: int, crop_pct: float, interpolation: str, crop_mode: str
) -> None:
    changes = {"crop_pct": crop_pct, "interpolation": interpolation, "crop_mode": crop_mode}
    assert_like_timm(config(size, **changes), noise(width, height))


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(40, 160),
    height=st.integers(40, 160),
    size=st.tuples(st.integers(8, 64), st.integers(8, 64)),
    crop_pct=st.sampled_from([0.875, 0.9, 1.0]),
    crop_mode=st.sampled_from(["center", "squash", "border"]),
)
def test_agrees_with_timm_for_inputs_that_are_not_square(
    width: int, height: int, size: tuple[int, int], crop_pct: float, crop_mode: str
) -> None:
    assert_like_timm(config(size, crop_pct=crop_pct, crop_mode=crop_mode), noise(width, height))


def test_height_and_width_survive_json_and_a_pair_of_equal_sides_is_a_square() -> None:
    pair = Preprocessing((48, 32), 0.9, MEAN, STD)
    assert (pair.height, pair.width) == (48, 32)
    assert Preprocessing.from_dict(json.loads(json.dumps(pair.to_dict()))) == pair
    assert Preprocessing((32, 32), 0.9, MEAN, STD) == Preprocessing(32, 0.9, MEAN, STD)
    assert Preprocessing((32, 32), 0.9, MEAN, STD).to_dict()["size"] == 32


@settings(max_examples=50, deadline=None)
@given(width=st.integers(40, 160), height=st.integers(40, 160), size=st.integers(8, 64))
def test_agrees_with_timm_when_padding_with_the_mean(width: int, height: int, size: int) -> None:
    for crop_pct in (0.9, 1.0):
        changed = config(size, crop_pct=crop_pct, crop_mode="border")
        assert_like_timm(changed, noise(width, height))


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "size", [(500, 375), (375, 500), (224, 224), (248, 249), (223, 225), (64, 64), (33, 901)]
)
def test_agrees_with_timm_at_usual_sizes(
    size: tuple[int, int], interpolation: str, crop_pct: float
) -> None:
    assert_like_timm(config(224, crop_pct=crop_pct, interpolation=interpolation), noise(*size))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_small_patch14_dinov2"]
)
def test_agrees_with_timm_for_the_configuration_of_a_model(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    assert_like_timm(config, noise(640, 427))


@pytest.mark.parametrize("width, height", [(1, 63_000), (63_000, 1)])
def test_a_very_long_image_differs_by_at_most_one_level(width: int, height: int) -> None:
    image = noise(width, height)
    expected = timm_pixels(config(32, crop_pct=1.0), image).astype(int)
    pixels = Preprocessing.from_timm(config(32, crop_pct=1.0)).pixels(image)
    assert np.abs(pixels - expected).max() <= 1


def test_a_very_long_image_needs_little_memory() -> None:
    image = Image.new("RGB", (1, 2_000_000), (10, 20, 30))
    for mode in ("center", "border", "squash"):
        preprocessing = Preprocessing(224, 0.9, MEAN, STD, crop_mode=mode)
        assert preprocessing.pixels(image)[112, 111].tolist() == [10, 20, 30]


def test_shapes_types_and_memory_order_are_as_documented() -> None:
    values, pixels = USUAL(noise(50, 40)), USUAL.pixels(noise(50, 40))
    assert values.shape == (3, 224, 224) and values.dtype == np.float32
    assert pixels.shape == (224, 224, 3) and pixels.dtype == np.uint8
    assert values.flags.c_contiguous and pixels.flags.c_contiguous and pixels.flags.writeable


def test_normalisation_follows_the_documented_formula() -> None:
    pixels = USUAL.pixels(noise(300, 300)).astype(np.float64)
    expected = ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(USUAL(noise(300, 300)), expected, atol=1e-6)


def test_the_image_is_not_changed() -> None:
    image = noise(60, 60)
    USUAL(image)
    assert image.tobytes() == noise(60, 60).tobytes()


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_images_of_another_mode_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=f"Image has mode '{mode}', expected 'RGB': use read_im"):
        USUAL(Image.new(mode, (4, 4)))


def test_survives_json() -> None:
    for crop_pct in (0.875, 1 / 3, 1):
        preprocessing = Preprocessing(384, crop_pct, MEAN, (1, 0.1 + 0.2, 0.5), "bilinear")
        stored = json.loads(json.dumps(preprocessing.to_dict()))
        assert Preprocessing.from_dict(stored) == preprocessing


def test_a_missing_or_unknown_key_is_refused() -> None:
    stored = USUAL.to_dict()
    with pytest.raises(
        CheckpointError, match=r"has the keys crop_mode, .*expected crop_mode, crop"
    ):
        Preprocessing.from_dict({k: v for k, v in stored.items() if k != "mean"})
    with pytest.raises(CheckpointError, match=r"has the keys .*gamma.*: the file comes from anoth"):
        Preprocessing.from_dict(stored | {"gamma": 2})
    with pytest.raises(CheckpointError, match="has the keys none"):
        Preprocessing.from_dict({})


WRONG_VALUES = [
    ("size", 0, "`size` is 0, but must be a whole number from 1 to 4096"),
    ("size", 224.0, "`size` is 224.0"),
    ("size", True, "`size` is True"),
    ("size", 10**9, "`size` is 1000000000"),
    ("crop_pct", 0.0, "`crop_pct` is 0.0, but must be a number from 0.1 to 2"),
    ("crop_pct", float("nan"), "`crop_pct` is nan"),
    ("crop_pct", "0.9", "`crop_pct` is '0.9'"),
    ("mean", (0.5,), "must be three numbers, one per channel"),
    ("mean", (0.5, 0.5, float("inf")), "must be three numbers, one per channel"),
    ("mean", 0.5, "`mean` is 0.5, but must be three numbers"),
    ("std", (0.5, 0, 0.5), "must be three numbers above 0"),
    ("std", ("a", "b", "c"), "must be three numbers above 0"),
    (
        "interpolation",
        "random",
        "`interpolation` is 'random', but must be one of bicubic, bilinear, lanczos",
    ),
    ("crop_mode", "none", "`crop_mode` is 'none', but must be one of border, center, squash"),
    ("crop_mode", ["center"], "`crop_mode` is"),
]


@pytest.mark.parametrize("name, value, message", WRONG_VALUES)
def test_a_value_outside_its_range_is_refused(name: str, value: Any, message: str) -> None:
    values = USUAL.to_dict() | {"mean": MEAN, "std": STD, name: value}
    with pytest.raises(SettingError, match=message):
        Preprocessing(**values)
    with pytest.raises(CheckpointError, match=f"Preprocessing cannot be used: .*{message}"):
        Preprocessing.from_dict(USUAL.to_dict() | {name: value})


@pytest.mark.parametrize("channels", [1, 4])
def test_inputs_that_are_not_rgb_are_refused(channels: int) -> None:
    shape = (channels, 224, 224)
    with pytest.raises(SettingError, match=rf"input has {channels} channels: use one of RGB"):
        Preprocessing.from_timm(config() | {"input_size": shape})


def test_preprocessing_needs_neither_torch_nor_timm() -> None:
    code = (
        "import sys, aoft_deploy.data.preprocessing; "
        "print({'torch', 'timm', 'torchvision'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
