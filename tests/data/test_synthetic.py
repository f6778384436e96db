from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from image_folders import pixels
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.data import scenes
from aoft_deploy.data.splits import Splits
from aoft_deploy.data.synthetic import load_task, task_names
from aoft_deploy.errors import SettingError, UnknownNameError

SCENES = [name for name in task_names() if name != "digits"]


def digest(splits: Splits) -> str:
    found = hashlib.sha256()
    for part in (splits.train, splits.val, splits.test):
        found.update(b"".join(image.tobytes() for image in pixels(part)))
        found.update(bytes(part.labels if part else ()))
    return found.hexdigest()


def small(name: str, seed: int = 0) -> Splits:
    return load_task(name, seed=seed, train=40, val=20, test=20)


def test_the_names_of_the_tasks() -> None:
    assert task_names() == ("colour", "count", "digits", "orientation", "position", "shape")


@pytest.mark.parametrize("name", task_names())
def test_equal_seeds_give_equal_pixels(name: str) -> None:
    assert digest(small(name)) == digest(small(name))
    assert digest(small(name)) != digest(small(name, seed=1))


def test_pixels_do_not_depend_on_the_process() -> None:
    code = (
        "import hashlib; from aoft_deploy.data.synthetic import load_task; "
        "train = load_task('count', train=40, val=1, test=0).train; "
        "print(hashlib.sha256(b''.join(train[i][0].tobytes() for i in range(40))).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = hashlib.sha256(b"".join(image.tobytes() for image in pixels(small("count").train)))
    assert done.stdout.strip() == here.hexdigest()


@pytest.mark.parametrize("name", task_names())
def test_splits_share_no_image(name: str) -> None:
    splits = small(name)
    found = [
        image.tobytes()
        for part in (splits.train, splits.val, splits.test)
        for image in pixels(part)
    ]
    assert len(set(found)) == len(found) == 80


@pytest.mark.parametrize("name", task_names())
def test_images_are_rgb_of_64_pixels_and_classes_are_sorted(name: str) -> None:
    splits = small(name)
    assert {image.shape for image in pixels(splits.train)} == {(64, 64, 3)}
    assert list(splits.classes) == sorted(set(splits.classes))
    assert set(splits.train.labels) <= set(range(len(splits.classes)))


@pytest.mark.parametrize("name", SCENES)
def test_scene_classes_are_equally_frequent(name: str) -> None:
    splits = load_task(name, train=96, val=48, test=0)
    for part in (splits.train, splits.val):
        assert set(np.bincount(part.labels)) == {len(part) // len(splits.classes)}


def test_the_default_sizes_are_1000_200_and_the_rest() -> None:
    for name, rest in (("digits", 597), ("shape", 1000)):
        splits = load_task(name)
        assert splits.test is not None
        assert (len(splits.train), len(splits.val), len(splits.test)) == (1000, 200, rest)


@pytest.mark.parametrize("name", ["digits", "shape"])
def test_a_test_size_of_zero_makes_no_test_part(name: str) -> None:
    assert load_task(name, train=9, val=9, test=0).test is None


def test_digits_use_every_scan_once() -> None:
    from sklearn.datasets import load_digits

    splits = load_task("digits")
    labels = [
        *splits.train.labels,
        *splits.val.labels,
        *(splits.test.labels if splits.test else ()),
    ]
    assert sorted(labels) == sorted(load_digits().target.tolist())


def test_a_longer_training_set_extends_a_shorter_one_and_keeps_the_test_set() -> None:
    short, long = (load_task("shape", train=n, val=10, test=10) for n in (20, 30))
    np.testing.assert_array_equal(pixels(short.train), pixels(long.train)[:20])
    np.testing.assert_array_equal(pixels(short.test), pixels(long.test))


def test_the_colour_task_uses_the_hue_of_the_class() -> None:
    splits = load_task("colour", train=40, val=1, test=0)
    for image, label in zip(pixels(splits.train), splits.train.labels, strict=True):
        target = scenes.HUES[splits.classes[label]]
        hsv = np.asarray(Image.fromarray(image).convert("HSV"), dtype=float).reshape(-1, 3)
        vivid = hsv[hsv[:, 1] > 150, 0] * (360 / 255)
        assert np.sum(np.abs((vivid - target + 180) % 360 - 180) < 25) > 100


class _Recorder(scenes.Canvas):
    """A canvas that records the calls of ``put``."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.default_rng(seed))
        self.put_calls: list[tuple[NDArray[np.float64], float]] = []

    def put(self, outline, centre, angle, colour):  # type: ignore[no-untyped-def]
        self.put_calls.append((np.asarray(centre), angle))
        super().put(outline, centre, angle, colour)


@pytest.mark.parametrize("label", range(8))
def test_the_count_task_draws_as_many_separate_shapes(label: int) -> None:
    canvas = _Recorder(label)
    scenes.count_scene(canvas, label)
    centres = [centre for centre, _ in canvas.put_calls]
    assert len(centres) == label + 1
    gaps = [np.linalg.norm(a - b) for i, a in enumerate(centres) for b in centres[:i]]
    assert min(gaps, default=99) > 12


@pytest.mark.parametrize("label", range(16))
def test_the_position_task_draws_the_star_in_its_cell(label: int) -> None:
    canvas = _Recorder(label)
    scenes.position_scene(canvas, label)
    cells = [int(y // 16) * 4 + int(x // 16) for (x, y), _ in canvas.put_calls]
    assert cells[0] == label
    assert label not in cells[1:]
    assert load_task("position", train=16, val=1, test=0).classes[label] == (
        f"row{label // 4 + 1}-column{label % 4 + 1}"
    )


@pytest.mark.parametrize("label", range(12))
def test_the_orientation_task_rotates_the_object_counter_clockwise(label: int) -> None:
    canvas = _Recorder(label)
    scenes.orientation_scene(canvas, label)
    assert abs(canvas.put_calls[-1][1] - 15 * label) <= 4
    blank = scenes.Canvas(np.random.default_rng(0))
    before = np.asarray(blank.image).copy()
    angle = 15 * label
    blank.put(scenes.BAR * (25, 4), np.array([32.0, 32]), angle, (255, 0, 255))
    y, x = np.nonzero((np.asarray(blank.image) != before).any(axis=-1))
    _, vectors = np.linalg.eigh(np.cov(x, -y))
    found = np.degrees(np.arctan2(vectors[1, -1], vectors[0, -1]))
    assert abs((found - angle + 90) % 180 - 90) < 1


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown task 'color'\. Did you mean colour\?"):
        load_task("color")


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"train": 0}, "`train` is 0, but must be a whole number from 1"),
        ({"val": 0}, "`val` is 0, but must be a whole number from 1"),
        ({"test": -1}, "`test` is -1, but must be a whole number from 0"),
        ({"seed": -1}, "`seed` is -1, but must be a whole number from 0"),
    ],
)
def test_numbers_outside_their_range_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        load_task("shape", **sizes)


@pytest.mark.parametrize("sizes", [{"train": 1598}, {"test": 598}])
def test_more_digits_than_exist_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=r"Task digits has 1,797 images, but 1,\d+ \+ 200"):
        load_task("digits", **sizes)
